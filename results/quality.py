"""Are the texts as good? Samples of plain decoding and of each method, compared.

    python results/quality.py --model DIR --lookahead FILE

Two samples of texts are compared by the mean log probability of their tokens, and by the share of
neighbouring pairs that are distinct.
"""
import itertools
import statistics
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
from torch import Tensor
from tqdm import tqdm

import bench
from model import Cache, Llama, load_model
from pass_sampler import Params
from support.errors import InputError, run_script
from support.prompts import read_prompts
from support.tables import print_tables
from support.terminal import add_common, new_parser


def two_sample(a: Tensor, b: Tensor, rounds: int = 9999) -> float:
    """p-value of a permutation test of equal means. a, b (prompts,samples): under the null
    hypothesis, that all samples of a prompt come from one distribution, any exchange between a and
    b within a prompt is as likely."""
    both = torch.cat([a, b], 1).double()
    n = a.shape[1]
    order = torch.rand(rounds, *both.shape, generator=torch.Generator().manual_seed(0)).argsort(2)
    shuffled = both.expand(rounds, -1, -1).gather(2, order)

    def gap(x):
        return (x[..., :n].mean((-2, -1)) - x[..., n:].mean((-2, -1))).abs()

    return (1 + (gap(shuffled) >= gap(both) - 1e-12).sum().item()) / (1 + rounds)


def power(a: Tensor, shift: float) -> float:
    """The chance that `two_sample` finds, at 0.05, a shift of the mean of a (prompts,samples)."""
    error = (2 * a.var(1).mean() / a.numel()).sqrt().clamp(min=1e-12)
    return statistics.NormalDist().cdf(shift / error.item() - 1.96)


def figures(model: Llama, prompt: list[int], text: list[int]) -> tuple[float, float]:
    """What a sample is judged by: mean log p, and % of distinct pairs."""
    tokens = torch.tensor([prompt + text], device=model.embedding.device)
    h = model(tokens[:, :-1], Cache(model, 1, tokens.shape[1]))[0, len(prompt) - 1:]
    log_p = model.logits(h).float().log_softmax(-1).gather(1, tokens[0, len(prompt):, None])
    pairs = list(zip(text, text[1:]))
    return log_p.mean().item(), 100 * len(set(pairs)) / max(1, len(pairs))


@torch.inference_mode()
def quality(args: Namespace) -> Iterator[str | dict]:
    """Samples of plain decoding and of each method, compared."""
    if args.samples < 2:
        raise InputError("--samples must be 2 or more: power needs a variance")
    model, tokenizer = load_model(args)
    prompts = read_prompts(args, tokenizer, model.config)
    yield f"{bench.described(args, model, prompts)} {args.samples} samples of each."
    yield ("log p: mean log probability of a token under the model; pairs: share of neighbouring "
           "pairs of tokens that are distinct. Of an exact method one p-value in twenty is below "
           "0.05. Power: the chance of one below 0.05 if the mean were shifted by 5 %.")
    for kind, t in itertools.product(prompts, args.temperatures):
        some = prompts[kind]
        plain = None
        context = max(map(len, some)) + args.new_tokens
        for number, spec in enumerate(["autoregressive", *args.methods]):
            name, make = bench.contender(args, model, tokenizer, spec, Params(t), args.samples)
            sampler = make(args.samples, context)
            judged = []
            for i in tqdm(range(len(some)), f"{name} at {t:g}", leave=False, disable=None):
                seed = args.seed + 10_000 * number + i
                made = sampler.generate([some[i]] * args.samples, args.new_tokens, seed)
                judged.append([figures(model, some[i], text) for text in made["tokens"]])
            values = torch.tensor(judged)  # (prompts,samples,figures)
            plain = values if plain is None else plain
            row = {"text": kind, "temperature": t, "method": name}
            for j, what in enumerate(("log p", "pairs %")):
                a, b = plain[..., j], values[..., j]
                row[what] = b.mean().item()
                row[f"p-value ({what})"] = two_sample(a, b) if number else ""
                row[f"power ({what})"] = power(a, 0.05 * a.mean().abs().item()) if number else ""
            yield row


def main() -> None:
    parser = new_parser(__doc__)
    add_common(parser.add_argument)
    bench.add_options(parser.add_argument, bench.TEXTS + bench.DRAFTED + "no-graph")
    parser.add_argument("--samples", type=int, default=16, help="of each prompt (default: 16)")
    parser.set_defaults(top_k=[0])
    args = parser.parse_args()
    bench.check_args(args)
    print_tables(quality(args), args.json)


if __name__ == "__main__":
    run_script(main)
