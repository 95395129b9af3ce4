"""Folders as people have them: spellings of config.json, tokenizers, weights. Where a checkpoint is
ambiguous, what transformers 5.24 does with it is right."""
import json
import shutil

import pytest
import torch
from common import FIXTURE
from safetensors.torch import load_file, save_file
from test_model import config_with

from model import Config, Llama, has_fbgemm
from support.errors import InputError
from support.tokenizer import load_tokenizer

tokenizers = pytest.importorskip("tokenizers")
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


# --------------------------------------------------- tokenizers

def byte_level(**more):
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {c: i for i, c in enumerate(alphabet)} | more
    hf = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    hf.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    hf.decoder = tokenizers.decoders.ByteLevel()
    return hf


TEXTS = ["", "def f(x):\n\treturn  x**2  # 1984\n", " leading and trailing ",
         "naïve — “quoted” Привет 你好 🎉👩‍👩‍👧 é"]


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_stream_as_whole_characters(text, folder, tmp_path):
    """As the packages decode them. Truncation and padding that tokenizer.json stores do not act."""
    from sentencepiece import SentencePieceProcessor
    sp = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    hf = byte_level()
    hf.add_special_tokens(["<end>"])
    for store in (lambda: hf.enable_truncation(8), lambda: hf.enable_padding(length=99)):
        store()
        hf.save(str(tmp_path / "tokenizer.json"))
        for path, decode in ((folder, sp.decode), (tmp_path, hf.decode)):
            tokenizer = load_tokenizer(path, 320)
            tokens = tokenizer.encode(text)
            stream = tokenizer.stream()
            parts = [stream(token) for token in tokens]
            assert "".join(parts).strip() == decode(tokens).strip()
            assert all("\ufffd" not in part for part in parts)
        assert len(tokens) == len(text.encode()) and tokenizer.unk is None
        assert tokenizer.decode([hf.token_to_id("<end>"), *tokens]) == text


def test_ids_beyond_the_number_of_entries_and_raw_entries(tmp_path):
    hf = byte_level(**{"hello": 300, "\u65e5\u672c": 301})
    hf.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path, 320)
    assert tokenizer.decode([300, 301]) == "hello\u65e5\u672c" == hf.decode([300, 301])
    with pytest.raises(InputError, match="do not belong together"):
        load_tokenizer(tmp_path, 301)


def test_special_tokens_that_the_model_does_not_have(tmp_path):
    hf = byte_level()
    hf.add_special_tokens(["<pad>"])
    hf.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"unk_token": 5}')  # of a wrong type
    assert load_tokenizer(tmp_path, 256).encode("ab") == hf.encode("ab").ids


@pytest.mark.parametrize("decoder", [None, tokenizers.decoders.BPEDecoder(),
                                     tokenizers.decoders.WordPiece()], ids=str)
def test_other_decoders_are_refused_by_name(decoder, tmp_path):
    hf = tokenizers.Tokenizer(tokenizers.models.WordLevel({"hello": 0, "world": 1, "?": 2}, "?"))
    if decoder is not None:
        hf.decoder = decoder
    hf.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match="its decoder, .*, is not supported"):
        load_tokenizer(tmp_path, 320)


def test_byte_fallback_with_a_strange_entry(tmp_path):
    vocabulary = {"<0x41>": 0, "<0xyz>": 1, "\u2581a": 2, "<unk>": 3}
    hf = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], byte_fallback=True))
    part = tokenizers.decoders
    hf.decoder = part.Sequence([part.Replace("\u2581", " "), part.ByteFallback(), part.Fuse()])
    hf.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path, 320).decode([2, 0, 1]) == " aA<0xyz>" == hf.decode([2, 0, 1])


@pytest.mark.parametrize("special", [False, True])
def test_tokens_added_to_a_sentencepiece_model(special, folder, tmp_path):
    """One token wherever it stands, and its text unless it is special."""
    plain = load_tokenizer(folder, 320)
    V = len(plain.pieces)
    shutil.copy(folder / "tokenizer.model", tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|im_start|>": V}))
    settings = {"eos_token": {"content": "<|im_start|>"}} if special else {}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(tmp_path, 321)
    tokens = tokenizer.encode("a<|im_start|>b<|im_start|>")
    assert tokens.count(V) == 2 and tokens[-1] == V and tokens[0] == plain.encode("")[0]
    assert ("<|im_start|>" in tokenizer.decode(tokens)) != special


@pytest.mark.parametrize("content", [
    b"", b"IQ== 0\nIg== 1\n", b"version https://git-lfs\n"], ids=str)
def test_a_good_tokenizer_beside_a_bad_one(content, tmp_path):
    byte_level().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer.model").write_bytes(content)
    assert load_tokenizer(tmp_path, 320).encode("ab")
    (tmp_path / "tokenizer.json").write_text("{}")
    for name in ("tokenizer.json", "tokenizer.model", "neither tokenizer.model nor"):
        with pytest.raises(InputError, match=name):
            load_tokenizer(tmp_path, 320)
        (tmp_path / name).unlink(missing_ok=True)
