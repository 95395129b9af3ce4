"""Command lines, and what is printed while a text is made."""
import json
import os
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

from tqdm import tqdm

from support.errors import DTYPES, InputError


def user_path(text: str) -> Path:
    """The path of a command line: `~` is the home folder, also where a shell leaves it, as in
    --model=~/x."""
    return Path(os.path.expanduser(text))


def new_parser(about: str) -> ArgumentParser:
    """An ArgumentParser whose --help shows the head of a module as it stands."""
    return ArgumentParser(description=about, formatter_class=RawDescriptionHelpFormatter)


def add_common(add: Callable, model_required: bool = True) -> None:
    """Add the words that scripts share. add: parser.add_argument."""
    add("--model", type=user_path, required=model_required, help="folder of a Hugging Face LLaMA")
    add("--dtype", choices=DTYPES,
        help="of the weights (default: the folder's; decoding on an x86 CPU: float16 for bfloat16)")
    add("--device", help="cpu or cuda (default: a GPU, if there is one)")
    add("--seed", type=int, default=0, help="of all random numbers (default: 0)")


def add_params(add: Callable, kind: type) -> None:
    """Add a word for each field of a dataclass of sampling parameters."""
    for f in fields(kind):
        off = "greedy" if f.name == "temperature" else "off"
        add(f"--{f.name.replace('_', '-')}", type=f.type, default=f.default,
            help=f"(default: {f.default:g}, {off})")


def read_params(args: Namespace, kind: type) -> object:
    """The sampling parameters of a command line; others than the temperature need one above 0."""
    params = kind(**{f.name: getattr(args, f.name) for f in fields(kind)})
    if params.temperature == 0 and params != kind():
        others = [f"--{f.name.replace('_', '-')}" for f in fields(kind)[1:]]
        raise InputError(f"{', '.join(others)} need a --temperature above 0")
    return params


def progress(total: int, what: str, unit: str, **options) -> tqdm:
    """A bar on stderr; in a pipe a line now and then."""
    return tqdm(total=total, desc=what, unit=unit, dynamic_ncols=True,
                mininterval=0.5 if sys.stderr.isatty() else 30, **options)


def has_colour() -> bool:
    """Is stdout a terminal that may be coloured? NO_COLOR counts where it is not empty."""
    wanted = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return wanted and sys.stdout.isatty()


def visible(text: str) -> str:
    """Text with control characters as pictures of themselves, but for tabs and ends of lines: a
    terminal would obey them, and a picture would not be well-formed."""
    return "".join(
        chr(0x2400 + ord(char)) if ord(char) < 32 and char not in "\n\t" else
        "\ufffd" if 127 <= ord(char) < 160 else char for char in text)


def printer(tokenizer, prompt: str) -> Callable[[int, int, bool], None]:
    """An on_token function: writes row 0 as it is made. On a terminal the prompt stands before it,
    and accepted drafts are green."""
    to_text = tokenizer.stream()
    colour = has_colour()
    shown = visible if sys.stdout.isatty() else str  # A pipe gets texts as they are.
    if sys.stdout.isatty():
        prompt = shown(prompt)
        print(f"\033[2m{prompt}\033[0m" if colour else prompt, end="", flush=True)

    def on_token(row, token, from_draft):
        text = shown(to_text(token)) if row == 0 else ""
        if text:
            text = f"\033[32m{text}\033[0m" if colour and from_draft else text
            print(text, end="", flush=True)

    return on_token


def report(result: dict, tokenizer, as_json: bool) -> None:
    """Print what `printer` has not: the texts of the other rows, and figures; or all as JSON."""
    texts = [tokenizer.decode(row) for row in result["tokens"]]
    if as_json:
        print(json.dumps(result | {"text": texts}))
        return
    for i, text in enumerate(texts[1:], 2):
        text = visible(text) if sys.stdout.isatty() else text
        print(f"\n--- sample {i}\n{text}", end="")
    print()
    legend = "; green: accepted drafts" if has_colour() else ""
    print(summary(result) + legend, file=sys.stderr)


def summary(result: dict) -> str:
    """A line of figures. The time that recording a graph took is not counted in the speed."""
    tokens = sum(map(len, result["tokens"]))
    seconds = result["seconds"] - result["capture_seconds"]
    each = " and text" if len(result["tokens"]) > 1 else ""
    shares = " ".join(f"{share:.2f}" for share in result["accepted_at_least"])
    kept = f"at least 1, 2, .. drafts accepted in {shares} of steps, " if shares else ""
    return (f"method {result['method']} on {result['device']}: {tokens} tokens, "
            f"{result['passes']} passes, {result['tokens_per_pass']:.2f} tokens per pass{each}, "
            f"{kept}{seconds:.2f} s "
            f"({result['prefill_seconds']:.2f} s of it prefill), "
            f"{tokens / seconds:.1f} tokens/s")
