"""Text to token ids and back: tokenizer.model, or tokenizer.json."""
import codecs
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from support.errors import InputError, extra
from support.storage import read_json, reason


class Tokenizer:
    """Text to token ids and back.

    encode(text) gives ids, with the beginning-of-text token where the model uses one, or without.
    pieces[id] is a token's bytes: none for control tokens, one of a character's for byte fallback.
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
        except UnicodeError as error:
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
    """folder/tokenizer.model, or folder/tokenizer.json through the optional package `tokenizers`.

    Raises InputError where it is missing, damaged, or larger than the model's vocabulary (but for
    special tokens, which need not be used).
    """
    folder = Path(folder)
    config = folder / "tokenizer_config.json"
    config = read_json(config) if config.exists() else {}
    model, other = folder / "tokenizer.model", folder / "tokenizer.json"
    if not model.exists() and not other.exists():
        raise InputError(f"{folder} has neither tokenizer.model nor tokenizer.json")
    tokenizer = None
    if model.exists():
        try:
            tokenizer = from_sentencepiece(model, config)
        except InputError:
            if not other.exists():
                raise
    tokenizer = tokenizer or from_tokenizers(other, config)
    if any(tokenizer.pieces[vocab_size:]):
        raise InputError(f"the tokenizer of {folder} has {len(tokenizer.pieces)} pieces and the "
                         f"model a vocabulary of {vocab_size}: they do not belong together")
    return tokenizer


def sentencepiece_bytes(piece: str) -> bytes:
    """The bytes of a sentencepiece: "<0x41>" is a byte, and a space is written as U+2581."""
    if re.fullmatch("<0x[0-9A-Fa-f]{2}>", piece):
        return bytes.fromhex(piece[3:5])
    return piece.replace("\u2581", " ").encode()


def named_token(token: object) -> str | None:
    """A token in tokenizer_config.json is a string, or an object with its content."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def added_tokens(folder: Path, config: dict) -> dict[str, tuple[int, bool]]:
    """{content: (id, special)} of what stands beside a tokenizer.model, in added_tokens.json and in
    tokenizer_config.json."""
    listed = folder / "added_tokens.json"
    named = ("bos_token", "eos_token", "unk_token", "pad_token")
    special = {named_token(config.get(name)) for name in named}
    found = {}
    for content, i in (read_json(listed) if listed.exists() else {}).items():
        found[content] = (i, content in special)
    decoder = config.get("added_tokens_decoder")
    for i, token in (decoder if isinstance(decoder, dict) else {}).items():
        content = named_token(token)
        if content and str(i).isdecimal():
            found[content] = (int(i), isinstance(token, dict) and bool(token.get("special")))
    for content, (i, _) in found.items():
        if not content or type(i) is not int or not 0 <= i < 2**24:
            raise InputError(f"{listed}: {content!r} has the id {i!r}, which is none")
    return found


def from_sentencepiece(path: Path, config: dict) -> Tokenizer:
    """tokenizer.model, and the tokens that were added to it."""
    from sentencepiece import SentencePieceProcessor
    try:
        sp = SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise InputError(f"cannot read {path}: {reason(error, path)}") from None
    bos = []
    if config.get("add_bos_token", True) and sp.bos_id() >= 0:
        bos = [sp.bos_id()]
    pieces = []
    for i in range(sp.vocab_size()):
        silent = sp.is_control(i) or sp.is_unused(i)
        pieces.append(b"" if silent else sentencepiece_bytes(sp.id_to_piece(i)))
    added = {}
    for content, (i, special) in added_tokens(path.parent, config).items():
        if i >= sp.vocab_size():
            added[content] = i
            pieces += [b""] * (i + 1 - len(pieces))
            pieces[i] = b"" if special else content.encode()
    longest_first = sorted(added, key=len, reverse=True)
    split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")

    def encode(text, begin):
        tokens = bos * begin
        for part in split.split(text) if added else [text]:
            tokens += [added[part]] if part in added else sp.encode(part)
        return tokens

    return Tokenizer(encode, pieces, sp.unk_id() if sp.unk_id() >= 0 else None)


def byte_alphabet() -> dict[str, int]:
    """{character: byte} of GPT-2: printable bytes as they are, the others from character 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    alphabet = {chr(b): b for b in printable}
    alphabet |= {chr(256 + i): b for i, b in enumerate(others)}
    return alphabet


def from_tokenizers(path: Path, config: dict) -> Tokenizer:
    """tokenizer.json, if it is of the kinds that LLaMAs have."""
    tokenizers = extra("tokenizers", "pip install -r requirements-smollm2.txt")
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
    alphabet = byte_alphabet()
    added = hf.get_added_tokens_decoder()

    def to_bytes(i):
        piece = hf.id_to_token(i) or ""
        if i in added:
            return b"" if added[i].special else added[i].content.encode()
        if not byte_level:
            return sentencepiece_bytes(piece)
        if all(char in alphabet for char in piece):
            return bytes(alphabet[char] for char in piece)
        return piece.encode()

    ids = hf.get_vocab(with_added_tokens=True).values()
    pieces = [to_bytes(i) for i in range(1 + max(ids, default=-1))]
    unk = named_token(config.get("unk_token")) or named_token(raw["model"].get("unk_token"))
    unk = hf.token_to_id(unk) if unk else None
    return Tokenizer(lambda text, begin: hf.encode(text, add_special_tokens=begin).ids, pieces, unk)


