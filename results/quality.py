"""Do the texts follow the model? Then each token's place in the model's distribution is uniform.

    python results/quality.py --model DIR --lookahead FILE --methods pass fused=1
    python results/quality.py --model DIR --lookahead FILE --methods pass --bug     # it is found

Take the vocabulary from the most to the least likely token, and U = the probability of all that
stands above the token that was written, plus a uniform random share of its own. If each token is
drawn from p, given the text before it, all U of all texts are independent and uniform (Rosenblatt
1952), whatever the drafts were. So every token counts, and plain decoding need not be sampled.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import support

support.ctrl_c_leaves(__name__)
import itertools
import math
from argparse import Namespace
from collections.abc import Iterator

import torch
from torch import Tensor

import bench
import pass_sampler
from model import Cache, Llama, load_model
from pass_sampler import Params, Sampler, probs
from support.errors import InputError, check_number, run_script
from support.prompts import read_prompts
from support.tables import print_tables
from support.terminal import add_common, new_parser, progress

ROWS = 32  # texts side by side


def places(p: Tensor, tokens: Tensor, v: Tensor) -> Tensor:
    """U (n,) of tokens (n,), which are drawn from p (n,V) under the null hypothesis. v (n,):
    uniform."""
    p = p.double()
    own = p.gather(1, tokens[:, None])
    above = (p * (p > own)).sum(1)
    numbers = torch.arange(p.shape[1], device=p.device)
    same = (p == own) & (numbers < tokens[:, None])  # Ties go by number.
    return above + (p * same).sum(1) + v * own[:, 0]


def p_value(u: Tensor) -> tuple[float, float]:
    """z of the mean of u (n,), and a p-value of u being independent and uniform: twice the smaller
    one of two, of the mean and of the largest distance from uniform (Kolmogorov-Smirnov)."""
    n = len(u)
    z = (u.mean().item() - 0.5) * math.sqrt(12 * n)
    of_mean = math.erfc(abs(z) / math.sqrt(2))
    u = u.sort().values
    steps = torch.arange(n + 1, device=u.device) / n
    distance = math.sqrt(n) * max((steps[1:] - u).max(), (u - steps[:-1]).max()).item()
    series = ((-1) ** (k - 1) * math.exp(-2 * (k * distance) ** 2) for k in range(1, 101))
    of_distance = 2 * sum(series) if distance > 0.2 else 1.0  # where the series converges
    return z, min(1.0, 2 * min(of_mean, of_distance))


def places_of_texts(model: Llama, params: Params, prompts: list[list[int]],
                    texts: list[list[int]], generator: torch.Generator) -> list[Tensor]:
    """U of all tokens of texts, each of which follows its prompt."""
    found = []
    for prompt, text in zip(prompts, texts):
        tokens = torch.tensor([prompt + text], device=model.embedding.device)
        h = model(tokens[:, :-1], Cache(model, 1, tokens.shape[1]))[0, len(prompt) - 1:]
        v = torch.rand(len(text), dtype=torch.float64, generator=generator).to(h.device)
        found.append(places(probs(model.logits(h), params), tokens[0, len(prompt):], v))
    return found


def write_and_place(model: Llama, sampler: Sampler, prompts: list[list[int]], args: Namespace,
                    what: str) -> tuple[Tensor, float]:
    """U of args.tokens tokens or more, and how often the first draft was accepted. No token ends a
    text."""
    generator = torch.Generator().manual_seed(args.seed)
    again = itertools.cycle(prompts)
    found = []
    accepted = []
    done = 0
    with progress(args.tokens, what, "token") as bar:
        while done < args.tokens:
            some = [next(again) for _ in range(sampler.rows)]
            made = sampler.generate(some, args.new_tokens, args.seed + done, stop_tokens=())
            found += places_of_texts(model, sampler.params, some, made["tokens"], generator)
            accepted += made["accepted_at_least"][:1]
            done = sum(map(len, found))
            bar.update(min(done, args.tokens) - bar.n)
    return torch.cat(found), sum(accepted) / max(1, len(accepted))


@torch.inference_mode()
def quality(args: Namespace) -> Iterator[str | dict]:
    """One p-value for each kind of prompt, setting and method."""
    model, tokenizer = load_model(args)
    prompts = read_prompts(args, tokenizer, model.config)
    settings = [Params(*values) for values in itertools.product(
        args.temperatures, args.top_k, args.top_p)]
    cells = len(prompts) * len(settings) * len(args.methods)
    yield bench.described(args, model, prompts)
    yield (f"Null hypothesis: each token is drawn from the model's own distribution. A p-value for "
           f"each of {cells} cells; significant at .05 in all: below {0.05 / cells:.1g}.")
    for (kind, some), params in itertools.product(prompts.items(), settings):
        context = max(map(len, some)) + args.new_tokens
        for name, make in bench.contenders(args, model, tokenizer, args.methods, params, ROWS):
            what = f"{name}, {kind}, {params.temperature:g}"
            u, accepted = write_and_place(model, make(ROWS, context), some, args, what)
            z, p = p_value(u)
            yield {"text": kind, "temperature": params.temperature, "top-k": params.top_k,
                   "top-p": params.top_p, "method": name + " with a bug" * args.bug,
                   "tokens": len(u), "first draft accepted": accepted, "z": z, "p-value": p,
                   "corrected": min(1.0, p * cells)}


def main() -> None:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add_common(add)
    bench.add_options(add, bench.TEXTS + bench.DRAFTED + "top-k no-graph")
    add("--top-p", type=float, nargs="+", default=[1.0], help="1 is off (default: 1)")
    add("--tokens", type=int, default=20_000, help="for each p-value, at least (default: 20000)")
    add("--bug", action="store_true", help="draw from p in place of the residual")
    parser.set_defaults(rows=[1], temperatures=[0.6, 1.0])
    args = parser.parse_args()
    bench.check_args(args)
    check_number("--tokens", args.tokens, 2**30, 100)
    if 0 in args.temperatures:
        raise InputError("at temperature 0 there is nothing random to test")
    if args.bug:
        pass_sampler.residual = lambda p, q: p
    print_tables(quality(args), args.json)


if __name__ == "__main__":
    run_script(main)
