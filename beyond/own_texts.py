"""Texts that the model itself writes, to train on: when it decodes, such texts are what it reads.

    python -m beyond.own_texts --model DIR --data PATH .. --count 6144 --out TEXTS

Each begins with PROMPT tokens of a file. A third is written at each of TEMPERATURES. Give TEXTS to
train_lookahead.py or demo/recipes/distill.py.
"""

import torch
from torch import Tensor
from tqdm import tqdm

from model import Llama, load_model
from pass_sampler import Params, Sampler
from support.checkpoint import write_texts
from support.data import PROMPT, TEMPERATURES, TEXT, add_data, check_context, read_data, windows
from support.errors import InputError, check_number, check_seed, run_script
from support.storage import check_writable
from support.terminal import add_common, new_parser, user_path

AT_ONCE = 256  # rows


def own_texts(model: Llama, prompts: Tensor, temperature: float, seed: int, length: int = TEXT
              ) -> Tensor:
    """Prompts (n,P), each with what the model writes after it: (n,length). It stops at no token."""
    rows = min(AT_ONCE, len(prompts))
    texts = []
    sampler = Sampler(model, "autoregressive", Params(temperature), rows, length)
    starts = range(0, len(prompts), rows)
    for i in tqdm(starts, f"writing at {temperature}", leave=False, disable=None):
        some = prompts[i:i + rows].tolist()
        written = sampler.generate(some, length - len(some[0]), seed + i, stop_tokens=())["tokens"]
        texts += [before + after for before, after in zip(some, written)]
    return torch.tensor(texts)


def main() -> None:
    parser = new_parser(__doc__)
    add_common(parser.add_argument)
    add_data(parser.add_argument)
    parser.add_argument("--count", type=int, default=6144,
                        help="a multiple of 3 (default: 6144)")
    parser.add_argument("--out", type=user_path, required=True, help="file to write")
    args = parser.parse_args()
    check_seed(args.seed)
    if args.count % len(TEMPERATURES):
        raise InputError(f"--count must be a multiple of {len(TEMPERATURES)}, not {args.count}")
    check_number("count", args.count, 2**24)
    check_writable(args.out)
    model, tokenizer = load_model(args, packed=False)
    check_context(model.config.context)
    tokens, _ = read_data(tokenizer, args.data, args.suffix, TEXT)
    parts = []
    for i, temperature in enumerate(TEMPERATURES, 1):
        generator = torch.Generator().manual_seed(args.seed + i)
        prompts = windows(tokens, args.count // len(TEMPERATURES), PROMPT, generator)
        parts.append(own_texts(model, prompts, temperature, args.seed + i))
    write_texts(torch.cat(parts), args.out, model.config)
    print(f"{args.out}: {args.count} texts of {TEXT} tokens")


if __name__ == "__main__":
    run_script(main)
