"""Text to train on: files, which of them are held out, pieces of them."""
import hashlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from support.errors import InputError
from support.terminal import user_path

TEXT = 128  # tokens of a text to train on
PROMPT = 48  # tokens of it that stand before the model begins to write
TEMPERATURES = (0.0, 0.6, 1.0)  # of texts that a model writes, to train and to measure on


def add_data(add: Callable) -> None:
    """Add the words that `read_data` takes. add: parser.add_argument."""
    add("--data", type=user_path, nargs="+", required=True, help="text files, and folders of them")
    add("--suffix", default="", help="of the files in folders, such as .py (default: all)")


def split_files(paths: list[Path], suffix: str) -> tuple[list[Path], list[Path]]:
    """All files below paths, whole: (to train on, held out). Held out is the tenth whose names
    hash lowest. Hidden files, and what is in hidden folders such as .git, are left out."""
    found = {}
    hidden = 0
    for path in paths:
        if not path.exists():
            raise InputError(f"--data {path} does not exist")
        inside = path.rglob("*") if path.is_dir() else [path]
        for file in inside:
            if not file.is_file() or not (file == path or file.name.endswith(suffix)):
                continue
            if any(part.startswith(".") for part in file.relative_to(path).parts):
                hidden += 1
            else:
                found.setdefault(file.resolve(), file)  # each once, by whatever name
    if hidden:
        print(f"--data: {hidden} hidden files are left out", file=sys.stderr)
    if len(found) < 2:
        of = f" with suffix {suffix}" if suffix else ""
        raise InputError(f"--data has {len(found)} files{of}; at least 2 are needed, as one is "
                         f"held out")

    def by_hash(file):
        return hashlib.sha256(os.fsencode(file.name)).digest()

    hashed = sorted(sorted(found.values()), key=by_hash)
    tenth = max(1, len(hashed) // 10)
    return sorted(hashed[tenth:]), sorted(hashed[:tenth])


def read_data(tokenizer, paths: list[Path], suffix: str, least: int) -> list[Tensor]:
    """Tokens of all files below paths: (N,) to train on and (N,) held out, more than `least`."""
    both = [], []
    for tokens, names in zip(both, split_files(paths, suffix)):
        for name in tqdm(names, "reading", leave=False, disable=None):
            try:
                content = name.read_bytes()
            except OSError as error:
                raise InputError(f"cannot read {name}: {error}") from None
            if b"\0" not in content:  # A file with a zero byte is no text.
                tokens += tokenizer.encode(content.decode("utf-8-sig", errors="replace"))
    if min(map(len, both)) <= least:
        raise InputError(f"--data has {len(both[0])} tokens and {len(both[1])} held out; more than "
                         f"{least} of both are needed")
    return [torch.tensor(tokens) for tokens in both]


def windows(tokens: Tensor, n: int, length: int, generator: torch.Generator) -> Tensor:
    """n random pieces (n,length) of tokens (N,)."""
    starts = torch.randint(len(tokens) - length, (n, 1), generator=generator)
    return tokens[starts + torch.arange(length)]


def check_context(context: int) -> None:
    """Raise InputError for a model that cannot read texts of TEXT tokens."""
    if context < TEXT:
        raise InputError(f"the model's context of {context} is shorter than the texts of {TEXT}")
