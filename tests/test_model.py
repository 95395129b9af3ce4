"""The model is LLaMA, the cache loses and leaks nothing, and what is not LLaMA is refused."""
import json
import shutil

import naive
import pytest
import torch
from common import FIXTURE, REAL, whole
from safetensors.torch import load_file, save_file

from model import Cache, Config, Llama, has_fbgemm
from support.errors import DTYPES, InputError


@pytest.mark.parametrize("name", ["tied", "untied", "plain"])
def test_equals_transformers(name):
    """Grouped, single and plain key/value heads; llama3, linear and no rotary scaling; both
    spellings of config.json."""
    model = Llama.load(FIXTURE / name)
    expected = load_file(FIXTURE / name / "expected.safetensors")
    B, T = expected["tokens"].shape
    h = model(expected["tokens"], Cache(model, B, T))
    torch.testing.assert_close(model.logits(h), expected["logits"], atol=2e-5, rtol=1e-5)
    assert model.config.stop_tokens == (2, 3)


@pytest.mark.skipif(not has_fbgemm("cpu"), reason="no FBGEMM here")
def test_float16_weights_compute_in_float32():
    """On an x86 CPU float16 is model.pack: only the weights are rounded, so float32 with rounded
    weights gives the same."""
    tokens = torch.arange(20).view(2, 10)
    run = lambda model: model.logits(model(tokens, Cache(model, 2, 10)))
    packed = Llama.load(FIXTURE / "untied", torch.float16)
    plain = Llama.load(FIXTURE / "untied", torch.float32)
    for name, weight in plain.named_parameters():
        if weight.ndim == 2 and name != "embedding":
            weight.copy_(weight.half())
    assert run(packed).dtype == torch.float32
    assert packed.precision == "float16 weights, float32 arithmetic"
    torch.testing.assert_close(run(packed), run(plain), atol=1e-5, rtol=1e-5)


def config_with(folder, to, **changes):
    to.mkdir(exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(config | changes))
    return to


def test_loads_shards_and_dtypes(tmp_path):
    shutil.copy(FIXTURE / "untied" / "config.json", tmp_path)
    weights = load_file(FIXTURE / "untied" / "model.safetensors")
    names, index = sorted(weights), {}
    for part, dtype in ((names[::2], torch.bfloat16), (names[1::2], torch.float64)):
        shard = {name: weights[name].bfloat16().to(dtype) for name in part}
        save_file(shard, tmp_path / f"{dtype}.safetensors")
        index |= dict.fromkeys(part, f"{dtype}.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    for name, tensor in Llama.load(tmp_path, torch.float64).named_weights().items():
        assert tensor.dtype == torch.float64, name
        assert torch.equal(tensor, weights[name].bfloat16().double()), name


def test_model(code=REAL):
    """Logits against the naive model's: ragged rows; blocks that are committed in part, in full,
    along a path, or not at all; a memory that nobody sees in the cache."""
    model = code.tiny(5, seed=2)
    cache = code.random_lookahead(model, 1).new_cache(model, 2, 16)
    judge = naive.Model(model)
    texts = [[1, 2, 3, 4, 0], [4, 0]]

    def agree(logits, text, row, what="the logits"):
        expected = torch.tensor(judge.next_logits(text), dtype=torch.float64)
        worst = (logits - expected).abs().max()
        assert worst < 1e-5, (
            f"{what} of row {row} after {text} are not LLaMA's, by up to {worst:.1e}")

    def run(columns, **more):
        return model.logits(model(torch.tensor(columns), cache, **more))

    logits = run([texts[0], texts[1] + [3, 3, 3]])
    for row, text in enumerate(texts):
        for i in range(len(text)):
            agree(logits[row, i], text[:i + 1], row)
    cache.commit(torch.tensor([5, 2]))
    run([[2, 2, 2], [1, 1, 1]])  # as if it had never run
    # A root, two children, a grandchild; committed columns first, what is not used yet last.
    path = torch.tensor([[1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0], [1, 1, 0, 1, 0, 0],
                         [1, 1, 0, 1, 1, 0]]).bool()
    positions = cache.length[:, None] + torch.tensor([0, 1, 1, 2])
    logits = run([[3, 1, 2, 4], [0, 2, 1, 1]], positions=positions, mask=cache.mask(4, path))
    for row, (root, _, child, grandchild) in enumerate([[3, 1, 2, 4], [0, 2, 1, 1]]):
        agree(logits[row, 3], texts[row] + [root, child, grandchild], row, "in a tree, the logits")
    cache.commit(torch.tensor([3, 2]), torch.tensor([[0, 2, 3], [0, 1, 0]]))
    for row, text in enumerate([[1, 2, 3, 4, 0, 3, 2, 4, 1], [4, 0, 0, 2, 1]]):
        agree(run([[1], [1]])[row, 0], text, row, "after a path was committed, the logits")
    assert cache.length.tolist() == [8, 4]
    alone = code.model.Cache(model, 1, 16)  # one row on a CPU is written in another way
    model(torch.tensor([[1, 2, 3]]), alone)
    alone.commit(2)
    logits = model.logits(model(torch.tensor([[3, 4]]), alone))
    agree(logits[0, 1], [1, 2, 3, 4], 0, "alone, the logits")


def test_types(code=REAL):
    """All float types give what float64 gives, within their rounding."""
    for name, tolerance in (("float16", 0.02), ("bfloat16", 0.15), ("float32", 1e-4)):
        logits = whole(code.tiny(50, dtype=DTYPES[name]), [1, 2, 3, 4, 5])
        off = (logits.double() - whole(code.tiny(50), [1, 2, 3, 4, 5])).abs().max()
        assert logits.dtype == DTYPES[name] and off < tolerance, f"{name} is off by {off:.1e}"


BAD_CONFIGS = [
    {"model_type": "mistral"}, {"hidden_act": "gelu"}, {"attention_bias": True},
    {"mlp_bias": True}, {"sliding_window": 16}, {"quantization_config": {"bits": 4}},
    {"rope_scaling": {"type": "yarn", "factor": 2}}, {"rope_scaling": {"type": "linear"}},
    {"rope_scaling": {"type": "linear", "factor": 0}}, {"rope_scaling": "linear"},
    {"rope_scaling": {"type": "linear", "factor": 10**400}}, {"rope_scaling": [1]},
    {"rope_scaling": {"rope_type": ["linear"]}}, {"rope_theta": "big"}, {"rope_theta": True},
    {"num_key_value_heads": 3}, {"num_attention_heads": 0}, {"num_hidden_layers": 2**30},
    {"hidden_size": "16"}, {"hidden_size": 2**31}, {"head_dim": 5}, {"vocab_size": None},
    {"vocab_size": 2**31 - 1, "hidden_size": 2**31 - 1},  # does not fit into memory
    {"rms_norm_eps": -1.0}, {"rms_norm_eps": float("nan")}, {"torch_dtype": "int8"},
    {"torch_dtype": ["float16"]}, {"dtype": {"a": 1}}, {"eos_token_id": "stop"},
    {"eos_token_id": [[1]]}]


@pytest.mark.parametrize("change", BAD_CONFIGS, ids=str)
def test_refuses_what_is_not_supported(change, tmp_path):
    with pytest.raises(InputError, match="config.json") as error:
        Llama.load(config_with(FIXTURE / "tied", tmp_path, **change))
    assert "\n" not in str(error.value)


def test_stop_tokens_of_generation_config_come_first(tmp_path):
    config_with(FIXTURE / "tied", tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 7}')
    assert Config.load(tmp_path).stop_tokens == (7,)


UP, BIAS = "model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.bias"


@pytest.mark.parametrize("name, tensor", [
    (UP, None), (BIAS, torch.zeros(48)), (UP, torch.zeros(47, 32)),
    (UP, torch.zeros(48, 32, dtype=torch.long)), (UP, torch.full((48, 32), torch.nan)),
    (UP, torch.full((48, 32), torch.inf))])
def test_bad_weights_are_named(name, tensor, tmp_path):
    """Missing, of another model, of a wrong shape or type, not finite."""
    weights = load_file(FIXTURE / "tied" / "model.safetensors") | {name: tensor}
    if tensor is None:
        del weights[name]
    save_file(weights, config_with(FIXTURE / "tied", tmp_path) / "model.safetensors")
    with pytest.raises(InputError, match=name):
        Llama.load(tmp_path)
