"""Texts that the model itself writes, to train on: when it decodes, such texts are what it reads.

    python -m beyond.own_texts --model DIR --data PATH .. --count 6144 --out TEXTS

Each begins with PROMPT tokens of a file. A third is written at each of TEMPERATURES. Give TEXTS to
train_lookahead.py or demo/distill.py.
"""
from pathlib import Path

import torch
from tqdm import tqdm

import files
from files import InputError
from model import load_model
from pass_sampler import Params, Sampler

TEXT = 128  # tokens
PROMPT = 48  # of them, before the model begins
TEMPERATURES = (0.0, 0.6, 1.0)
AT_ONCE = 256  # rows


def own_texts(model, prompts, temperature, seed, length=TEXT):
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


def read_texts(path, config):
    """(N,TEXT), of a file that this script made for this model."""
    with files.open_tensors(path) as file:
        if (file.metadata() or {}).get("texts") != files.fingerprint(config):
            raise InputError(f"{path} has no texts by this model: make some with beyond.own_texts")
        return file.get_tensor("texts").long()


def check_context(model):
    """Raise InputError for a model that cannot read texts of TEXT tokens."""
    if model.config.context < TEXT:
        raise InputError(f"the model's context of {model.config.context} is shorter than the texts "
                         f"of {TEXT}")


def main():
    parser = files.new_parser(__doc__)
    files.add_common(parser.add_argument)
    files.add_data(parser.add_argument)
    parser.add_argument("--count", type=int, default=6144,
                        help="a multiple of 3 (default: 6144)")
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    args = parser.parse_args()
    files.check_seed(args.seed)
    if args.count % len(TEMPERATURES):
        raise InputError(f"--count must be a multiple of {len(TEMPERATURES)}, not {args.count}")
    files.check_number("count", args.count, 2**24)
    files.check_writable(args.out)
    model, tokenizer = load_model(args, packed=False)
    check_context(model)
    tokens, _ = files.read_data(tokenizer, args.data, args.suffix, TEXT)
    parts = []
    for i, temperature in enumerate(TEMPERATURES, 1):
        generator = torch.Generator().manual_seed(args.seed + i)
        prompts = files.windows(tokens, args.count // len(TEMPERATURES), PROMPT, generator)
        parts.append(own_texts(model, prompts, temperature, args.seed + i))
    about = {"texts": files.fingerprint(model.config)}
    files.write_tensors({"texts": torch.cat(parts).int()}, args.out, about)
    print(f"{args.out}: {args.count} texts of {TEXT} tokens")


if __name__ == "__main__":
    files.run_script(main)
