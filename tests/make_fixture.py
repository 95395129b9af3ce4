"""Made tests/fixture/ once, with transformers 5.24.0: small random LLaMAs in Hugging Face's format
and the logits it gives for them.

    pip install transformers==5.24.0 && python tests/make_fixture.py
"""
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

SCALINGS = {
    "default": {},
    "linear": {"factor": 4.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 16},
}
KINDS = [
    ("tied", "llama3", True, 2), ("untied", "linear", False, 1), ("plain", "default", False, 4)]
for name, scaling, tied, kv_heads in KINDS:
    torch.manual_seed(1)
    rope = {"rope_type": scaling, "rope_theta": 500.0, **SCALINGS[scaling]}
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=kv_heads, head_dim=12, rms_norm_eps=1e-5,
        max_position_embeddings=64, tie_word_embeddings=tied, initializer_range=0.2,
        eos_token_id=[2, 3], rope_parameters=rope)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for norm in (p for n, p in model.named_parameters() if "norm" in n):
            norm.uniform_(0.5, 1.5)
        tokens = torch.randint(64, (2, 48))
        logits = model(tokens).logits
    folder = Path(__file__).parent / "fixture" / name
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    save_file({"tokens": tokens, "logits": logits}, folder / "expected.safetensors")
    if name == "tied":  # the older spelling of the same config
        raw = json.loads((folder / "config.json").read_text())
        rope = raw.pop("rope_parameters")
        raw["rope_theta"] = rope.pop("rope_theta")
        raw["rope_scaling"] = rope
        raw["torch_dtype"] = raw.pop("dtype")
        (folder / "config.json").write_text(json.dumps(raw, indent=2))
