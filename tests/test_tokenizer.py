"""Tokenizers as folders have them. What becomes of a token is the same whichever file it is in.
Where a folder is ambiguous, what transformers 5.24 does is right; for plain text with a
tokenizer.model, what sentencepiece does."""
import json
import sys
import tempfile
from pathlib import Path

import pytest
from common import REAL, ROOT, sentencepiece

from support.errors import InputError
from support.tokenizer import load_tokenizer

tokenizers = pytest.importorskip("tokenizers")


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


# --------------------------------------------------- added tokens

START, END = "<|im_start|>", "<|im_end|>"
MODEL = {"tokenizer.model": sentencepiece((ROOT / "LICENSE").read_text())}


def tokenizer_json(*added):
    """tokenizer.json of 256 bytes, <s>, </s> and `added`."""
    hf = byte_level()
    hf.add_special_tokens(["<s>", "</s>"])
    hf.add_tokens([*added])
    return {"tokenizer.json": json.loads(hf.to_str())}


def loaded(files, code=REAL):
    """The tokenizer of a folder of files: {name: bytes, or what is written as JSON}."""
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            if not isinstance(content, bytes):
                content = json.dumps(content).encode()
            (Path(folder) / name).write_bytes(content)
        return code.tokenizer.load_tokenizer(folder, 5000)


def config(**settings):
    return {"tokenizer_config.json": settings}


def decoder(i, **flags):
    """As transformers writes an added token into tokenizer_config.json."""
    return config(added_tokens_decoder={str(i): {"content": START, **flags}})


def test_one_token_wherever_it_is(code=REAL):
    """A token beside the vocabulary is found in a prompt, as one id, the next free one; so are <s>
    and </s>."""
    for files in (tokenizer_json(), MODEL):
        plain = loaded(files, code)
        size = len(plain.pieces)
        begin = plain.encode("")
        stop = plain.encode("</s>")[len(begin):]
        assert len(stop) == 1, "</s> is no token of a prompt"
        assert plain.decode(plain.encode("<s></s>")) == ""
        for more in (
            decoder(size), {"added_tokens.json": {START: size}}, config(eos_token=START),
            config(pad_token={"content": START}), config(image_token=START),
            config(extra_special_tokens=[START]), config(additional_special_tokens=[START]),
            {"special_tokens_map.json": {"eos_token": START}},
        ):
            assert loaded(files | more, code).encode(START) == [*begin, size], f"{more} is not read"


def test_which_file_wins(code=REAL):
    """The table in support/added_tokens.py."""
    size = len(loaded(MODEL, code).pieces)
    special = tokenizers.AddedToken(START, special=True)
    shown = tokenizers.AddedToken(START, special=False)
    older = {"added_tokens.json": {START: 258}}
    for files, printed in [
        (tokenizer_json(special) | decoder(258), START),
        (tokenizer_json(shown) | decoder(258, special=True), ""),
        (tokenizer_json(special) | older, ""), (tokenizer_json() | older, START),
        (MODEL | older, START), (MODEL | decoder(size, special=True), ""),
        (MODEL | tokenizer_json(special), ""),
    ]:
        tokenizer = loaded(files, code)
        tokens = tokenizer.encode(START)
        assert tokens[-1] in (258, size), f"no token with {[*files]}"
        assert tokenizer.decode(tokens) == printed, f"another file wins among {[*files]}"
    for more in (older, {"special_tokens_map.json": {"pad_token": START}}):
        files = tokenizer_json() | config(added_tokens_decoder={}) | more
        assert len(loaded(files, code).encode(START)) == len(START), f"{[*more]} is read"


def test_special_tokens_and_stop_tokens_print_nothing(code=REAL):
    """Also where a file says that they are not special."""
    for files in (tokenizer_json(), MODEL):
        size = len(loaded(files, code).pieces)
        listed = decoder(size, special=False)["tokenizer_config.json"]
        for more, printed in [
            ({}, START), ({"tokenizer_config.json": listed | {"eos_token": START}}, ""),
            ({"config.json": {"eos_token_id": size}}, ""),
            ({"generation_config.json": {"eos_token_id": [1, size]}}, ""),
        ]:
            tokenizer = loaded(files | {"tokenizer_config.json": listed} | more, code)
            assert tokenizer.decode([size]) == printed, f"{more} has no effect on what is printed"


LLAMA = {"tokenizer_class": "LlamaTokenizer"}


def test_spaces_around_added_tokens(code=REAL):
    """Where sentencepiece's space is put, as transformers does: by class, legacy and
    add_prefix_space, in either file."""
    pieces = sorted(set("user import ".replace(" ", "\u2581")))
    hf = tokenizers.Tokenizer(
        tokenizers.models.BPE({piece: i for i, piece in enumerate(pieces)}, []))
    hf.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(split=False)
    hf.decoder = tokenizers.decoders.Metaspace()
    for settings, first, after in [
        ({}, " ", " "), ({"legacy": True}, " ", " "),
        (LLAMA, " ", ""), (LLAMA | {"legacy": False}, " ", ""),
        (LLAMA | {"legacy": True}, " ", " "),
        (LLAMA | {"add_prefix_space": False}, "", ""),
    ]:
        for files in ({"tokenizer.json": json.loads(hf.to_str())}, MODEL):
            tokenizer = loaded(files | config(eos_token=START, **settings), code)
            for text, shown in (("import", first + "import"), (START + "user", after + "user")):
                assert tokenizer.decode(tokenizer.encode(text)) == shown, (text, settings)
    tokenizer = loaded(MODEL | config(legacy=False, eos_token=START), code)
    assert tokenizer.decode(tokenizer.encode(START + "user")) == "user"


def test_spaces_that_belong_to_a_token():
    """lstrip and rstrip take them in; single_word wants no letter beside the token."""
    demo = {"tokenizer.model": (ROOT / "demo/model/tokenizer.model").read_bytes()}  # keeps spaces
    for files in (tokenizer_json(), demo):
        size = len(loaded(files).pieces)
        for flag, text in [("special", f"a  {END} b"), ("lstrip", f"a{END} b"),
                           ("rstrip", f"a  {END}b"), ("single_word", f"a  {END} b")]:
            listed = {"content": END, "special": False, flag: True}
            tokenizer = loaded(files | config(added_tokens_decoder={str(size): listed}))
            shown = tokenizer.decode(tokenizer.encode(f"a  {END} b"))
            assert shown == (text.replace(END, "") if flag == "special" else text), flag
        assert size not in tokenizer.encode(f"a{END}")


def test_ends_of_a_text():
    tokens = [loaded(MODEL | config(add_bos_token=bos, add_eos_token=eos)).encode("a")
              for bos, eos in ((True, True), (False, False))]
    assert tokens[0] == [1, *tokens[1], 2] and loaded(MODEL).encode("a") == [1, *tokens[1]]


@pytest.mark.parametrize("ids", [{"a": "b"}, {"a": -1}, {"a": 2**70}, {"a": True}, {"a": [1]},
                                 {"": 3}])
def test_tokens_that_are_none(ids):
    with pytest.raises(InputError, match="added_tokens.json: .* is no token"):
        loaded(tokenizer_json() | {"added_tokens.json": ids})


def test_the_unknown_token():
    """That of a Unigram model in tokenizer.json has an id, and no name."""
    unigram = tokenizers.models.Unigram([("a", -1.0), ("?", -9.0), ("\u2581", -2.0)], unk_id=1)
    hf = tokenizers.Tokenizer(unigram)
    hf.decoder = tokenizers.decoders.Metaspace()
    unigram = {"tokenizer.json": json.loads(hf.to_str())}
    for files, unk in [(unigram, 1), (MODEL, 0), (tokenizer_json(), None),
                       (tokenizer_json() | config(unk_token="</s>"), 257)]:
        assert loaded(files).unk == unk
    assert loaded(unigram).encode("ab") == [0, 1]


def test_without_the_package(folder, tmp_path, monkeypatch, capsys):
    """tokenizer.json is read by a package that not everybody has: a tokenizer.model beside it is
    read in its place, and that is said."""
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    byte_level().save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match="this needs the package tokenizers"):
        load_tokenizer(tmp_path, 320)
    (tmp_path / "tokenizer.model").symlink_to(folder / "tokenizer.model")
    ids = load_tokenizer(tmp_path, 320).encode("some text")
    assert ids == load_tokenizer(folder, 320).encode("some text")
    assert "the package tokenizers is missing" in capsys.readouterr().err
