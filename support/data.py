"""Text to train on: files, which of them are held out, pieces of them; texts that a model wrote."""
import hashlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from support.errors import InputError
from support.terminal import progress, user_path

TEXT = 128  # tokens of a text to train on
PROMPT = 48  # tokens of it that stand before the model begins to write
TEMPERATURES = (0.0, 0.6, 1.0)  # of texts that a model writes, to train and to measure on


LARGEST = 2**28  # bytes of a file that is read


def add_data(add: Callable, required: bool = True) -> None:
    """Add the words that `read_data` takes. add: parser.add_argument."""
    add("--data", type=user_path, nargs="+", action="extend", required=required,
        help="text files, and folders of them")
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

    train, held = split_held(sorted(found.values()), lambda file: os.fsencode(file.name))
    return sorted(train), sorted(held)


def split_held(items: list, name: Callable[[object], bytes]) -> tuple[list, list]:
    """(to train on, held out): held out is the tenth of items, but at least one, whose names hash
    lowest. Both in the order of the hashes."""
    hashed = sorted(items, key=lambda item: hashlib.sha256(name(item)).digest())
    tenth = max(1, len(hashed) // 10)
    return hashed[tenth:], hashed[:tenth]


def read_data(tokenizer, paths: list[Path], suffix: str, least: int) -> list[Tensor]:
    """Tokens of all files below paths: (N,) to train on and (N,) held out, more than `least`."""
    both = [], []
    files = split_files(paths, suffix)
    left_out = {f"larger than {LARGEST >> 20} MiB": 0, "no text": 0}
    large, no_text = left_out
    with progress(sum(map(len, files)), "reading", "file") as bar:
        for tokens, names in zip(both, files):
            for name in names:
                bar.update()
                try:
                    if name.stat().st_size > LARGEST:
                        left_out[large] += 1
                        continue
                    content = name.read_bytes()
                except OSError as error:
                    raise InputError(f"cannot read {name}: {error}") from None
                if b"\0" in content:
                    left_out[no_text] += 1
                    continue
                tokens += tokenizer.encode(content.decode("utf-8-sig", errors="replace"))
    for why, count in left_out.items():
        if count:
            print(f"--data: {count} files are left out: {why}", file=sys.stderr)
    if min(map(len, both)) <= least:
        raise InputError(f"--data has {len(both[0])} tokens and {len(both[1])} held out; more than "
                         f"{least} of both are needed")
    return [torch.tensor(tokens) for tokens in both]


def windows(tokens: Tensor, n: int, length: int, generator: torch.Generator) -> Tensor:
    """n random pieces (n,length) of tokens (N,)."""
    starts = torch.randint(len(tokens) - length, (n, 1), generator=generator)
    return tokens[starts + torch.arange(length)]


def check_context(context: int, length: int = TEXT) -> None:
    """Raise InputError for a model that cannot read texts of so many tokens."""
    if context < length:
        raise InputError(f"the model's context of {context} is shorter than the texts of {length}")


class Texts(NamedTuple):
    """N texts that a model wrote after prompts, padded at their end."""
    tokens: Tensor  # (N,T)
    begin: Tensor  # (N,): where the model's own text begins
    end: Tensor  # (N,): where it ends
    temperature: Tensor  # (N,)
    held: Tensor  # (N,) bool: not to train on, but to measure on

    @staticmethod
    def of(texts: list[list[int]], begin: list[int], temperature: float, held: list[bool]
           ) -> "Texts":
        """Of lists of token ids."""
        rows = [torch.tensor(text) for text in texts]
        tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        end = torch.tensor([*map(len, texts)])
        return Texts(tokens, torch.tensor(begin), end,
                     torch.full((len(texts),), temperature, dtype=torch.float64),
                     torch.tensor(held))

    @staticmethod
    def joined(parts: list["Texts"]) -> "Texts":
        """One Texts of several."""
        width = max(part.tokens.shape[1] for part in parts)
        padded = []
        for part in parts:
            room = width - part.tokens.shape[1]
            padded.append(part._replace(tokens=torch.nn.functional.pad(part.tokens, (0, room))))
        return Texts(*map(torch.cat, zip(*padded)))

    def chosen(self, which: Tensor) -> "Texts":
        """Some of them, by number or by a bool for each."""
        return Texts(*(x[which] for x in self))

    def quarter(self) -> "Texts":
        """The first quarter of those of each temperature, but at least one."""
        some = []
        for t in self.temperature.unique():
            rows = (self.temperature == t).nonzero()[:, 0]
            some.append(rows[:max(1, len(rows) // 4)])
        return self.chosen(torch.cat(some))


def long_enough(pool: Tensor | Texts, L: int) -> Tensor | Texts:
    """The texts in which the model wrote more than L tokens, so that each of L look-ahead tokens
    has one to guess. Raises InputError where there is none. Tokens (N,) of files come back as they
    are."""
    if torch.is_tensor(pool):
        return pool
    enough = pool.end - pool.begin > L
    for t in TEMPERATURES if pool.held.any() else []:
        if not enough[pool.temperature == t].any():
            raise InputError(f"the texts to measure on have none of temperature {t:g} with more "
                             f"than {L} new tokens: give --data too, or make more")
    if not enough.any():
        raise InputError(f"the texts to train on have none with more than {L} new tokens: ask for "
                         f"a smaller --length")
    return pool.chosen(enough)


def tokens_of(pool: Tensor | Texts) -> Tensor:
    """(N,): the tokens of files, or of all texts without what pads them."""
    if torch.is_tensor(pool):
        return pool
    width = pool.tokens.shape[1]
    return pool.tokens[torch.arange(width) < pool.end[:, None]]
