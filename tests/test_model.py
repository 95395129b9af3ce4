"""The model is LLaMA, the cache loses and leaks nothing, and what is not LLaMA is refused."""
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import naive
from common import FIXTURE, REAL, tiny, whole
from files import InputError, load_tokenizer
from model import DTYPES, Cache, Config, Llama, has_fbgemm
from pass_sampler import Lookahead, generate


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
    plain = generate(packed, [[5, 6]], "autoregressive", max_new_tokens=9)
    lookahead = Lookahead(packed.embedding[:3])
    result = generate(packed, [[5, 6]], "pass", max_new_tokens=9, lookahead=lookahead)
    assert result["tokens"] == plain["tokens"]


def config_with(folder, to, **changes):
    to.mkdir(exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(config | changes))
    return to


def test_a_half_precision_checkpoint_runs_as_fast_as_the_machine_can(tmp_path):
    """By default: float16 weights where `pack` can, else the checkpoint's own type; never so
    where the weights are to be read."""
    half = shutil.copytree(FIXTURE / "plain", tmp_path / "half")
    config_with(FIXTURE / "plain", half, dtype="bfloat16")
    fast = "float16" if has_fbgemm("cpu") else "bfloat16"
    assert Llama.load(half).precision.split()[0] == fast
    assert Llama.load(half, packed=False).precision == "bfloat16"
    assert Llama.load(half, torch.bfloat16).precision == "bfloat16"
    assert Llama.load(FIXTURE / "plain").precision == "float32"


def test_loads_shards_and_dtypes(tmp_path):
    weights = load_file(FIXTURE / "untied" / "model.safetensors")
    shutil.copy(FIXTURE / "untied" / "config.json", tmp_path)
    names = sorted(weights)
    index = {}
    for i, part in enumerate((names[::2], names[1::2])):
        save_file({n: weights[n].bfloat16() for n in part}, tmp_path / f"part{i}.safetensors")
        index |= dict.fromkeys(part, f"part{i}.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    model = Llama.load(tmp_path, torch.float64)
    for name, tensor in model.named_weights().items():
        assert tensor.dtype == torch.float64, name
        assert torch.equal(tensor, weights[name].bfloat16().double()), name


def test_block_by_block_equals_whole():
    """Any cut of a text into blocks, token ids or embeddings, gives what the whole gives."""
    model = tiny(50)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(50, (20,), generator=generator).tolist()
    cache = Cache(model, 1, 20)
    logits = []
    start = 0
    for T in (1, 5, 2, 1, 8, 3):
        x = torch.tensor([tokens[start:start + T]])
        h = model(model.embed(x) if T == 5 else x, cache)
        cache.commit(T)
        logits.append(model.logits(h)[0])
        start += T
    torch.testing.assert_close(torch.cat(logits), whole(model, tokens))


def check_model(code):
    """Logits against the naive model's: ragged rows; blocks that are committed in part, in full,
    along a path, or not at all; a memory that nobody sees in the cache."""
    model = code.tiny(5, seed=2)
    cache = code.model.Cache(model, 2, 16).with_memory(code.random_lookahead(model, 1).memory)
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
    path = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]]).bool()
    # A root, two children, a grandchild.
    positions = cache.length[:, None] + torch.tensor([0, 1, 1, 2])
    logits = run([[3, 1, 2, 4], [0, 2, 1, 1]], positions=positions, mask=cache.mask(4, path))
    for row, (root, _, child, grandchild) in enumerate([[3, 1, 2, 4], [0, 2, 1, 1]]):
        agree(logits[row, 3], texts[row] + [root, child, grandchild], row, "in a tree, the logits")
    cache.commit(torch.tensor([3, 2]), torch.tensor([[0, 2, 3], [0, 1, 0]]))
    for row, text in enumerate([[1, 2, 3, 4, 0, 3, 2, 4, 1], [4, 0, 0, 2, 1]]):
        agree(run([[1], [1]])[row, 0], text, row, "after a path was committed, the logits")
    assert cache.length.tolist() == [8, 4]


def test_model():
    check_model(REAL)


def check_one_row(code):
    """One row on a CPU is written to the cache in another way."""
    model = code.tiny(5, seed=2)
    judge = naive.Model(model)
    cache = code.model.Cache(model, 1, 16)
    model(torch.tensor([[1, 2, 3]]), cache)
    cache.commit(2)
    logits = model.logits(model(torch.tensor([[3, 4]]), cache))[0, 1]
    expected = torch.tensor(judge.next_logits([1, 2, 3, 4]), dtype=torch.float64)
    assert (logits - expected).abs().max() < 1e-5, "the logits of a single row are not LLaMA's"


def test_one_row():
    check_one_row(REAL)


def check_types(code):
    """All float types give what float64 gives, within their rounding."""
    for name, tolerance in (("float16", 0.02), ("bfloat16", 0.15), ("float32", 1e-4)):
        logits = whole(code.tiny(50, dtype=DTYPES[name]), [1, 2, 3, 4, 5])
        off = (logits.double() - whole(code.tiny(50), [1, 2, 3, 4, 5])).abs().max()
        assert logits.dtype == DTYPES[name] and off < tolerance, f"{name} is off by {off:.1e}"


def test_all_float_types_agree():
    check_types(REAL)


def test_block_beyond_the_cache_is_an_error():
    model = tiny(50)
    for rows in (1, 2):
        with pytest.raises((IndexError, RuntimeError)):
            model(torch.tensor([[1, 2, 3]] * rows), Cache(model, rows, 2))


@pytest.mark.parametrize("change", [
    {"model_type": "mistral"}, {"hidden_act": "gelu"}, {"attention_bias": True},
    {"mlp_bias": True}, {"sliding_window": 16}, {"quantization_config": {"bits": 4}},
    {"rope_scaling": {"type": "yarn", "factor": 2}}, {"rope_scaling": {"type": "linear"}},
    {"num_key_value_heads": 3}, {"num_attention_heads": 0}, {"hidden_size": "16"},
    {"vocab_size": None}, {"torch_dtype": "int8"}, {"head_dim": 5}, {"rms_norm_eps": -1.0}])
def test_refuses_what_is_not_supported(change, tmp_path):
    with pytest.raises(InputError, match="config.json"):
        Config.load(config_with(FIXTURE / "tied", tmp_path, **change))


def test_stop_tokens_of_generation_config_come_first(tmp_path):
    config_with(FIXTURE / "tied", tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 7}')
    assert Config.load(tmp_path).stop_tokens == (7,)


@pytest.mark.parametrize("kind", [
    "missing", "extra", "shape", "dtype", "truncated", "no file", "no shard"])
def test_bad_weights_are_named(kind, tmp_path):
    weights = load_file(FIXTURE / "tied" / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    config_with(FIXTURE / "tied", tmp_path)
    if kind == "missing":
        del weights[name]
    if kind == "extra":
        name = "model.layers.0.self_attn.q_proj.bias"
        weights[name] = torch.zeros(48)
    if kind == "shape":
        weights[name] = weights[name][:-1]
    if kind == "dtype":
        weights[name] = weights[name].long()
    path = tmp_path / "model.safetensors"
    save_file(weights, path)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    if kind.startswith("no "):
        path.unlink()
        if kind == "no shard":
            index = {"weight_map": {name: "part.safetensors"}}
            (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    in_the_file = kind in ("missing", "extra", "shape", "dtype")
    with pytest.raises(InputError, match=name if in_the_file else "safetensors"):
        Llama.load(tmp_path)


TEXTS = ["def f(x):\n\treturn  x**2  # 1984\n",
         "naïve — “quoted” Привет 你好 🎉👩‍👩‍👧 é", " leading and trailing "]


@pytest.mark.parametrize("text", TEXTS)
def test_sentencepiece_streams_whole_characters(folder, text):
    tokenizer = load_tokenizer(folder, 320)
    tokens = tokenizer.encode(text)
    stream = tokenizer.stream()
    parts = [stream(token) for token in tokens]
    assert "\ufffd" not in "".join(parts)
    from sentencepiece import SentencePieceProcessor
    sp = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert "".join(parts).strip() == sp.decode(tokens).strip()
    assert tokens[0] == sp.bos_id() and parts[0] == ""


@pytest.mark.parametrize("text", TEXTS)
def test_tokenizer_json_streams_whole_characters(tmp_path, text):
    tokenizers = pytest.importorskip("tokenizers")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {c: i for i, c in enumerate(alphabet)}
    hf = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    hf.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    hf.decoder = tokenizers.decoders.ByteLevel()
    hf.add_special_tokens(["<end>"])
    hf.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path, 320)
    tokens = tokenizer.encode(text)
    stream = tokenizer.stream()
    parts = [stream(token) for token in tokens]
    assert len(tokens) == len(text.encode()) and "".join(parts) == text
    assert all("\ufffd" not in part for part in parts)
    assert tokenizer.decode([hf.token_to_id("<end>"), *tokens]) == text and tokenizer.unk is None
