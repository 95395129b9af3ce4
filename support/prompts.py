"""Prompts: where they come from, and which cannot be continued."""
import math
import operator
import os
import stat
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable
from typing import TextIO

from support.chat import add_chat, message_encoder
from support.errors import InputError
from support.storage import read_json
from support.terminal import user_path

DEFAULT_PROMPT = "def fibonacci(n):\n"
DEFAULT_MESSAGE = "Why is the sky blue?"


def add_prompt(parser: ArgumentParser) -> None:
    """Add the words that `read_prompt` reads."""
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", help="text to continue, or with --chat to answer")
    source.add_argument("--prompt-file", type=user_path, help="file that has it")
    source.add_argument("stdin", nargs="?", choices=["-"], help="standard input has it")
    add_chat(parser.add_argument)


def read_prompt(args: Namespace) -> str:
    """The text to continue: standard input, --prompt-file, --prompt, or else what is piped in."""
    try:
        if args.stdin or args.prompt is None and args.prompt_file is None and is_piped(sys.stdin):
            if sys.stdin is None:
                raise OSError("standard input is closed")
            text = sys.stdin.buffer.read().decode("utf-8-sig")
        elif args.prompt_file is not None:
            text = args.prompt_file.read_bytes().decode("utf-8-sig")
        else:
            default = DEFAULT_MESSAGE if args.chat else DEFAULT_PROMPT
            text = default if args.prompt is None else args.prompt
        text.encode()  # A command line that is not UTF-8 fails here.
    except (OSError, UnicodeError) as error:
        raise InputError(f"cannot read the prompt: {error}") from None
    if not text:
        raise InputError("the prompt is empty; give --prompt TEXT, --prompt-file FILE, or - for "
                         "standard input")
    return text


def is_piped(stream: TextIO | None) -> bool:
    """Is standard input a pipe or a file? Then it is the prompt, however late it comes."""
    try:
        mode = os.fstat(stream.fileno()).st_mode
    except (AttributeError, OSError, ValueError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode) or stat.S_ISSOCK(mode)


def read_prompts(args: Namespace, tokenizer, config) -> dict[str, list[list[int]]]:
    """{kind: prompts, as lists of token ids} of the JSON file args.prompts."""
    texts = read_json(args.prompts)
    encode = message_encoder(args.model, tokenizer) if args.chat else tokenizer.encode
    prompts = {}
    for kind in args.kinds or texts or ["code"]:  # An empty file has no code.
        some = texts.get(kind)
        if not isinstance(some, list) or not all(isinstance(text, str) for text in some):
            raise InputError(f"{args.prompts} must hold {{kind: [text, ..]}}, and has no such "
                             f"{kind!r}")
        prompts[kind] = [encode(text) for text in some[:args.count]]
        check_room(prompts[kind], args.new_tokens, config)
    return prompts


def check_room(prompts: list[list[int]], new_tokens: int, config) -> None:
    """Raise InputError for prompts that cannot be continued by so many tokens: a text that the
    model's context cuts short would not compare."""
    check_prompts(prompts, new_tokens, config.vocab_size, config.context)
    longest = max(map(len, prompts))
    if longest + new_tokens > config.context:
        raise InputError(f"a prompt of {longest} tokens and {new_tokens} new ones are more than "
                         f"the model's context of {config.context}")


def integers(values: Iterable) -> list[int] | None:
    """The integers that a list, an array or a tensor holds; None for what holds others."""
    if isinstance(values, bytes):
        return None  # a text
    try:
        return [operator.index(value) for value in values]
    except TypeError:
        return None


def check_prompts(prompts: list[list[int]], max_new_tokens: int, vocab_size: int, context: int,
                  rows: float = math.inf) -> list[list[int]]:
    """Prompts as lists. Raises InputError for what cannot be continued. context: the longest text,
    in tokens. rows: prompts at once, at most."""
    try:
        prompts = [integers(prompt) for prompt in prompts]
    except TypeError:
        prompts = [None]
    if not prompts or not integers([max_new_tokens]) or max_new_tokens < 1:
        raise InputError("at least one prompt and one new token are needed")
    if len(prompts) > rows:
        raise InputError(f"{len(prompts)} prompts for a Sampler of {rows} rows")
    for prompt in prompts:
        if prompt is None:
            raise InputError("prompts must be a list of lists of token ids")
        if not prompt:
            raise InputError("the prompt is empty; give at least one token")
        if len(prompt) >= context:
            raise InputError(f"the prompt has {len(prompt)} tokens and a text at most {context}: "
                             f"shorten the prompt")
        if not 0 <= min(prompt) <= max(prompt) < vocab_size:
            raise InputError(f"the prompt has tokens from {min(prompt)} to {max(prompt)}, the "
                             f"model 0 to {vocab_size - 1}: is it the model's tokenizer?")
    return prompts


def checked_stop_tokens(stop_tokens: Iterable[int], vocab_size: int) -> list[int]:
    """A list of them. Raises InputError for what are not ids of tokens: a string would never match
    one."""
    ids = integers(stop_tokens)
    if ids is None or not all(0 <= token < vocab_size for token in ids):
        raise InputError(f"stop_tokens must be a list of token ids from 0 to {vocab_size - 1}, not "
                         f"{stop_tokens!r}")
    return ids
