"""Folders as people have them: spellings of config.json, weights. Where a checkpoint is ambiguous,
what transformers 5.24 does with it is right."""
import shutil

import pytest
import torch
from common import FIXTURE
from safetensors.torch import load_file, save_file
from test_model import config_with

from model import Config, Llama, has_fbgemm

DEFAULT = {"rope_type": "default"}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}


# --------------------------------------------------- rotary keys

@pytest.mark.parametrize("changes, theta, scaling", [
    ({}, 1e4, "default"),
    ({"rope_theta": 500}, 500, "default"),
    ({"rope_theta": None}, 1e4, "default"),
    ({"rope_theta": 100, "rope_parameters": DEFAULT | {"rope_theta": 5e5}}, 5e5, "default"),
    ({"rope_theta": None, "rope_parameters": DEFAULT | {"rope_theta": 5e5}}, 5e5, "default"),
    ({"rope_theta": 100, "rope_parameters": DEFAULT}, 100, "default"),
    ({"rope_theta": 100, "rope_scaling": LLAMA3, "rope_parameters": {"rope_theta": 7}},
     100, "llama3"),
    ({"rope_scaling": LLAMA3 | {"rope_theta": 9}, "rope_parameters": None}, 9, "llama3"),
    ({"rope_scaling": None, "rope_parameters": LLAMA3 | {"rope_theta": 9}}, 9, "llama3"),
    ({"rope_scaling": {"type": "linear", "factor": 4}}, 1e4, "linear"),
    ({"rope_theta": 3580165449.0}, 3580165449.0, "default"),
    ({"partial_rotary_factor": None, "sliding_window": None}, 1e4, "default"),
])
def test_rotary_keys(changes, theta, scaling, tmp_path):
    changes = {"rope_parameters": None} | changes
    found = Config.load(config_with(FIXTURE / "plain", tmp_path, **changes))
    assert found.rope_theta == theta and found.rope["rope_type"] == scaling


# --------------------------------------------------- weights

def test_a_tied_config_with_a_head_of_its_own(tmp_path):
    """The head in the file is used where it differs; alone it stands for the embedding."""
    shutil.copy(FIXTURE / "tied" / "config.json", tmp_path)
    weights = load_file(FIXTURE / "tied" / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    load = lambda: Llama.load(tmp_path, torch.float32)
    for head, tied in ((embedding.clone(), True), (embedding + 1, False)):
        save_file(weights | {"lm_head.weight": head}, tmp_path / "model.safetensors")
        assert load().config.tied == tied and torch.equal(load().output, head)
        assert torch.equal(load().embedding, embedding)
    del weights["model.embed_tokens.weight"]
    save_file(weights | {"lm_head.weight": embedding + 1}, tmp_path / "model.safetensors")
    assert load().config.tied and torch.equal(load().embedding, embedding + 1)


def test_names_of_a_base_model(tmp_path):
    """AutoModel saves a tied model without the prefix `model.`; old files carry rotary tensors."""
    shutil.copy(FIXTURE / "tied" / "config.json", tmp_path)
    weights = load_file(FIXTURE / "tied" / "model.safetensors")
    renamed = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    renamed["layers.0.self_attn.rotary_emb.cos_cached"] = torch.zeros(3)
    save_file(renamed, tmp_path / "model.safetensors")
    for name, tensor in Llama.load(tmp_path, torch.float32).named_weights().items():
        assert torch.equal(tensor, weights[name].float()), name


def test_the_length_that_a_folder_says(tmp_path):
    changes = {"rope_parameters": {"rope_type": "linear", "factor": 4},
               "max_position_embeddings": 64, "max_sequence_length": 256}
    assert Config.load(config_with(FIXTURE / "plain", tmp_path, **changes)).context == 256


@pytest.mark.skipif(not has_fbgemm("cpu"), reason="no FBGEMM here")
@pytest.mark.parametrize("large", [7e4, 1e5, 3e38])
def test_what_does_not_fit_float16_stays_float32(large, tmp_path):
    config_with(FIXTURE / "untied", tmp_path, dtype="bfloat16")
    weights = load_file(FIXTURE / "untied" / "model.safetensors")
    weights["lm_head.weight"][3] = large
    weights["lm_head.weight"][4] = large / 2
    weights = {name: w.bfloat16() for name, w in weights.items()}
    save_file(weights, tmp_path / "model.safetensors")
    packed = Llama.load(tmp_path)
    assert torch.equal(packed.output, weights["lm_head.weight"].float())
    assert not torch.is_tensor(packed.layers[0].qkv)
    for plain in (Llama.load(tmp_path, packed=False), Llama.load(tmp_path, torch.bfloat16)):
        assert plain.precision == "bfloat16"
