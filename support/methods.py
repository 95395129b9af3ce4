"""What a method is to a command line: its name, its options, how these are read.

The methods themselves are in METHODS of pass_sampler.py, and beyond/ adds more. `methods` is that
dict in the functions below.
"""
import importlib.util
from argparse import Namespace
from collections.abc import Callable
from typing import Any, NamedTuple

from support.errors import InputError, check_options
from support.tokenizer import Tokenizer


class Method(NamedTuple):
    """An entry of METHODS. A method's own options stand with it.

    step: a function of a Sampler and of options, which returns a Step. flags: {option: what
    argparse is told of it}. read(model, tokenizer, **given): turns what a command line gives into
    options of `step`. shape: the flag that "=SHAPE" stands for in `bench.py --methods`.
    """
    step: Callable
    flags: dict[str, dict] = {}
    read: Callable[..., dict] = lambda model, tokenizer, **given: given
    shape: str = "length"


def add_beyond(module: str = "") -> None:
    """Let beyond/ add its methods, for command lines. Without that folder there are the paper's."""
    if importlib.util.find_spec("beyond"):
        importlib.import_module(f"beyond.{module}".rstrip("."))


def method_named(methods: dict[str, Method], name: str) -> Method:
    """One of the methods."""
    if name not in [*methods]:
        raise InputError(f"there is no method {name!r}, only {', '.join(methods)}; more come with "
                         f"`import beyond`")
    return methods[name]


def add_flags(add: Callable, methods: dict[str, Method]) -> None:
    """Add the flags of all methods, each once. add: parser.add_argument."""
    found = {}
    for name, method in methods.items():
        for flag, about in method.flags.items():
            texts = found.setdefault(flag, (about, {}))[1]
            texts.setdefault(about["help"], []).append(name)
    for flag, (about, texts) in found.items():
        told = "; ".join(f"{', '.join(names)}: {text}" for text, names in texts.items())
        add(f"--{flag.replace('_', '-')}", **about | {"help": told})


def given_flags(args: Namespace, methods: dict[str, Method]) -> dict[str, Any]:
    """{flag: value} of the flags of methods, None where a command line does not give it."""
    return {flag: getattr(args, flag) for method in methods.values() for flag in method.flags}


def method_options(methods: dict[str, Method], name: str, given: dict, model: Any,
                   tokenizer: Tokenizer) -> dict:
    """The options of a method, of what a command line gives: {word: value}, None where it was not
    given. A word that would have no effect is refused."""
    given = {word: value for word, value in given.items() if value is not None}
    method = method_named(methods, name)
    check_options(name, given, [*method.flags], [])
    return method.read(model, tokenizer, **given)
