"""Tokens beside a vocabulary: which there are, which are not printed, which end a text.

Several files of a folder may describe the same token. As in transformers, the first of these wins:

1. `added_tokens_decoder` in tokenizer_config.json; if it is there, 3 and special_tokens_map.json
   are not read.
2. tokenizer.json; without it, the control pieces of tokenizer.model.
3. added_tokens.json.
4. Special tokens that special_tokens_map.json or else tokenizer_config.json names.

All of them are found in a prompt, one token each. A token prints nothing if a file calls it
special, if 4 names it, or if its id is an `eos_token_id`. New ones get the next free ids.
"""
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from support.errors import InputError
from support.storage import read_json

# Keys of special tokens, in the order in which new ones get their ids.
ROLES = [f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]


class Added(NamedTuple):
    """A token that is found in a text before the vocabulary is asked. Fields as in transformers."""
    content: str
    special: bool = False  # It prints nothing.
    lstrip: bool = False  # It takes in the spaces before it.
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False

    @property
    def printed(self) -> bytes:
        return b"" if self.special else self.content.encode()


def token_of(value: object, **flags: bool) -> Added | None:
    """A token of a JSON file: a string, or an object with content and flags. Else None."""
    if isinstance(value, dict):
        flags = {flag: bool(value.get(flag)) for flag in Added._fields[1:]} | flags
        value = value.get("content")
    return Added(value, **flags) if isinstance(value, str) and value else None


def by_id(path: Path, pairs: Iterable[tuple]) -> list[Added]:
    """The tokens of pairs (id, token), in the order of the ids."""
    found = []
    for i, value in pairs:
        token = token_of(value)
        if not token or not str(i).isdecimal() or len(str(i)) > 8:
            raise InputError(f"{path}: {str(value)[:40]!r}, with id {str(i)[:40]!r}, is no token")
        found.append((int(i), token))
    return [token for _, token in sorted(found)]


def read_settings(folder: Path) -> dict:
    """tokenizer_config.json, with what special_tokens_map.json has in place of it."""
    settings = {}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).exists() and "added_tokens_decoder" not in settings:
            settings |= read_json(folder / name)
    return settings


def added_tokens(folder: Path, settings: dict, own: list[Added]) -> list[Added]:
    """All of them, each once. own: those of tokenizer.json or tokenizer.model."""
    values = [settings.get(role) for role in ROLES]
    values += [value for key, value in settings.items() if key.endswith("_token")]
    more = settings.get("extra_special_tokens") or settings.get("additional_special_tokens")
    values += more.values() if isinstance(more, dict) else more if isinstance(more, list) else []
    named = [token for value in values if (token := token_of(value, special=True))]
    special = {token.content for token in named}

    path, older = folder / "tokenizer_config.json", folder / "added_tokens.json"
    decoder = settings.get("added_tokens_decoder")
    tokens = by_id(path, decoder.items() if isinstance(decoder, dict) else ()) + own
    if older.exists() and "added_tokens_decoder" not in settings:
        for token in by_id(older, [pair[::-1] for pair in read_json(older).items()]):
            tokens.append(token._replace(normalized=token.content not in special))
    found = {}
    for token in tokens + named:
        silent = token.special or token.content in special
        found.setdefault(token.content, token._replace(special=silent))
    return [*found.values()]


def stop_tokens(folder: Path) -> tuple[int, ...]:
    """The ids that end a text. generation_config.json comes first, as in transformers."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        stop = read_json(path).get("eos_token_id") if path.exists() else None
        if stop is not None:
            break
    if not isinstance(stop, list):
        stop = [] if stop is None else [stop]
    if not all(type(token) is int for token in stop):
        raise InputError(f"{path}: eos_token_id must be a token's id or a list of them, not {stop}")
    return tuple(stop)
