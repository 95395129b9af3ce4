"""Texts that the model itself writes, to train on: when it decodes, such texts are what it reads.

    python -m beyond.own_texts --model DIR --data PATH .. --out TEXTS    # after pieces of files
    python -m beyond.own_texts --model DIR --chat FILE --out TEXTS       # answers to messages

A third of the texts after files is written at each of TEMPERATURES. Each message is answered in the
model's chat template: once at temperature 0, and --answers times at each of the others. Texts from
a tenth of the files and messages are held out, to measure on. Give TEXTS to train_lookahead.py or
demo/recipes/distill.py.
"""
import sys
from argparse import Namespace
from typing import NamedTuple

import torch

from model import Llama, load_model
from pass_sampler import Params, Sampler
from support.chat import message_encoder
from support.checkpoint import write_texts
from support.data import (
    PROMPT,
    TEMPERATURES,
    TEXT,
    Texts,
    add_data,
    check_context,
    read_data,
    split_held,
    windows,
)
from support.errors import InputError, check_number, check_seed, run_script
from support.storage import check_writable, read_json
from support.terminal import add_common, new_parser, progress, user_path
from support.tokenizer import Tokenizer

AT_ONCE = 2**15  # tokens of texts that are written side by side
LONGEST = 192  # tokens of a message: longer ones are left out


class Beginning(NamedTuple):
    """A prompt, and how the model continues it."""
    prompt: list[int]
    temperature: float
    held: bool  # Is the text to measure on?


def from_data(args: Namespace, tokenizer: Tokenizer) -> list[Beginning]:
    """Pieces of files: args.count in all, and a tenth as many of held-out files."""
    found = []
    tokens, held = read_data(tokenizer, args.data, args.suffix, TEXT)
    each = args.count // len(TEMPERATURES)
    for i, temperature in enumerate(TEMPERATURES, 1):
        generator = torch.Generator().manual_seed(args.seed + i)
        some = windows(tokens, each, PROMPT, generator).tolist()
        found += [Beginning(prompt, temperature, False) for prompt in some]
        some = windows(held, max(1, each // 10), PROMPT, generator).tolist()
        found += [Beginning(prompt, temperature, True) for prompt in some]
    return found


def from_messages(args: Namespace, tokenizer: Tokenizer) -> list[Beginning]:
    """The messages of args.chat. Held out is the tenth that hashes lowest."""
    messages = []
    for kind, some in read_json(args.chat).items():
        if not isinstance(some, list) or not all(isinstance(text, str) for text in some):
            raise InputError(f"{args.chat} must hold {{kind: [message, ..]}}, and {kind!r} is "
                             f"something else")
        messages += some

    encode = message_encoder(args.model, tokenizer)
    prompts = {text: encode(text) for text in messages}
    kept = [text for text, prompt in prompts.items() if len(prompt) <= LONGEST]
    if len(kept) < len(prompts):
        print(f"--chat: {len(prompts) - len(kept)} messages of more than {LONGEST} tokens are left "
              f"out", file=sys.stderr)
    if len(kept) < 2:
        raise InputError(f"{args.chat} has {len(kept)} messages of at most {LONGEST} tokens; at "
                         f"least 2 are needed, as one is held out")
    train, held = split_held(kept, lambda text: text.encode(errors="replace"))
    found = []
    for i, text in enumerate(held + train):
        for temperature in TEMPERATURES:
            answers = args.answers if temperature else 1
            found += [Beginning(prompts[text], temperature, i < len(held))] * answers
    return found


def own_texts(model: Llama, prompts: list[list[int]], temperature: float, seed: int,
              new_tokens: int, stop_tokens: list[int] | None = None) -> list[list[int]]:
    """Each of prompts, lists of token ids, with what the model writes after it. stop_tokens: as in
    `Sampler.generate`."""
    longest = max(map(len, prompts)) + new_tokens
    rows = min(len(prompts), max(1, AT_ONCE // longest))
    sampler = Sampler(model, "autoregressive", Params(temperature), rows, longest)
    texts = []
    with progress(len(prompts), f"writing at {temperature}", "text") as bar:
        for i in range(0, len(prompts), rows):
            some = prompts[i:i + rows]
            written = sampler.generate(some, new_tokens, seed + i, stop_tokens=stop_tokens)
            texts += [before + after for before, after in zip(some, written["tokens"])]
            bar.update(len(some))
    return texts


def write_all(model: Llama, beginnings: list[Beginning], seed: int, new_tokens: int,
              stop_tokens: list[int] | None) -> Texts:
    """The texts of all beginnings, those of similar length at once."""
    parts = []
    for i, temperature in enumerate(TEMPERATURES, 1):
        some = [beginning for beginning in beginnings if beginning.temperature == temperature]
        some.sort(key=lambda beginning: len(beginning.prompt))
        prompts = [beginning.prompt for beginning in some]
        texts = own_texts(model, prompts, temperature, seed + i, new_tokens, stop_tokens)
        held = [beginning.held for beginning in some]
        parts.append(Texts.of(texts, [*map(len, prompts)], temperature, held))
    return Texts.joined(parts)


def parse() -> Namespace:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add_common(add)
    add_data(add, required=False)
    add("--count", type=int, default=6144,
        help="texts after files; a tenth more are held out (default: 6144)")
    add("--chat", type=user_path, metavar="FILE",
        help='JSON file {"chat": [message, ..]}')
    add("--answers", type=int, default=3, help="per message and temperature (default: 3)")
    add("--new-tokens", type=int, default=128, help="of an answer, at most (default: 128)")
    add("--out", type=user_path, required=True, help="file to write")
    args = parser.parse_args()
    check_seed(args.seed)
    if args.data and args.count % len(TEMPERATURES):
        raise InputError(f"--count must be a multiple of {len(TEMPERATURES)}, not {args.count}")
    check_number("count", args.count, 2**24)
    check_number("answers", args.answers, 1000)
    check_number("new-tokens", args.new_tokens, 2**16)
    if args.data is None and args.chat is None:
        raise InputError("give --data, --chat, or both")
    check_writable(args.out)
    return args


def main() -> None:
    args = parse()
    model, tokenizer = load_model(args, packed=False)
    check_context(model.config.context, TEXT if args.chat is None else LONGEST + args.new_tokens)
    pieces = from_data(args, tokenizer) if args.data else []
    messages = from_messages(args, tokenizer) if args.chat else []
    parts = []
    if pieces:
        parts.append(write_all(model, pieces, args.seed, TEXT - PROMPT, ()))
    if messages:
        parts.append(write_all(model, messages, args.seed, args.new_tokens, None))
    texts = Texts.joined(parts)
    write_texts(texts, args.out, model.config)
    print(f"{args.out}: {len(texts.end)} texts of {texts.tokens.shape[1]} tokens at most, "
          f"{int(texts.held.sum())} of them to measure on")


if __name__ == "__main__":
    run_script(main)
