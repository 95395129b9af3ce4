"""Watch PaSS happen: a few steps on one text, with all numbers.

    python demo/steps.py                                   # the model of this repository
    python demo/steps.py --prompt "import " --temperature 0 --steps 5
    python demo/steps.py --model DIR --lookahead FILE

`step` is PaSS once more, for one text, with Python's own `if` and `for`. It has no batches and no
CUDA graphs, which pass_sampler.py has; from the same seed both write the same text, and a test says
so. x_n is the last token of the text, which is not in the cache yet; LA_j are look-ahead tokens,
d_j drafts, p the target's distribution, q a draft's, u random numbers from 0 to 1.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import support

support.ctrl_c_leaves(__name__)
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from model import Cache, Llama, load_model
from pass_sampler import Lookahead, Params, draw, load_lookahead, probs
from support.chat import add_chat, encode_prompt
from support.errors import InputError, check_number, check_seed, run_script
from support.prompts import check_prompts
from support.terminal import add_common, add_params, has_colour, new_parser, read_params, visible
from support.tokenizer import Tokenizer

# ---------------------------------------------------- the algorithm


@dataclass
class Happened:
    """What a step did."""
    position: int  # of x_n: the tokens before it are in the cache
    x_n: int
    sees_1: Tensor  # (1+L,S): which slots of the cache each column of pass 1 sees
    p_next: float  # of x, the model's own next token
    x: int
    sees_2: Tensor  # (1+L,S): the same for pass 2
    drafts: list["Draft"] = field(default_factory=list)
    residual: Tensor | None = None  # (V,), what was drawn from after a rejection
    u_last: float = 0.0
    last: int = 0


@dataclass
class Draft:
    """A draft, and how it was judged."""
    token: int
    q: float
    p: float = 0.0
    u: float = 0.0
    verdict: str = "not judged"


def drawn(p: Tensor, u: float) -> int:
    """A token of p (V,) by the random number u."""
    return int(draw(p, torch.tensor(u, dtype=torch.float64)))


def step(model: Llama, embeddings: Tensor, params: Params, x_n: int, cache: Cache, u: list[float]
         ) -> Happened:
    """One step of PaSS. embeddings (L,D): of the look-ahead tokens. The cache holds the text before
    x_n. u: 2 L + 2 random numbers."""
    L = len(embeddings)
    u_next, *u = u
    u_draft, u_verify = u[:L], u[L:]
    position = int(cache.length)

    # Pass 1: x_n, and after it the look-ahead tokens. Of all these only x_n stays in the cache.
    block = torch.cat([model.embed(torch.tensor([[x_n]])), embeddings[None]], 1)
    sees_1 = cache.mask(1 + L)[0]
    logits = model.logits(model(block, cache))[0]  # (1+L,V)
    cache.commit(1)

    # x_n yields the next token, from the model itself. LA_j yields d_j, a guess of the token after
    # the one that will stand in its place.
    p = probs(logits[0], params)
    x = drawn(p, u_next)
    happened = Happened(position, x_n, sees_1, float(p[x]), x, cache.mask(1 + L)[0])
    qs = []
    for j in range(L):
        q = probs(logits[1 + j], params)
        token = drawn(q, u_draft[j])
        happened.drafts.append(Draft(token, float(q[token])))
        qs.append(q)

    # Pass 2: the new token and the drafts, as if the drafts were the text. It yields the model's
    # own distribution p after each of them.
    tokens = [x] + [draft.token for draft in happened.drafts]
    ps = probs(model.logits(model(torch.tensor([tokens]), cache))[0], params)  # (1+L,V)

    # Keep drafts until the first rejection. There, draw from what is left of p.
    accepted = 0
    for draft, p, q, u_accept in zip(happened.drafts, ps, qs, u_verify):
        draft.p = float(p[draft.token])
        draft.u = u_accept
        if u_accept * draft.q < draft.p:  # u < p/q
            draft.verdict = "accepted"
            accepted += 1
        else:
            draft.verdict = "rejected"
            rest = (p - q).clamp(min=0)
            happened.residual = rest / rest.sum() if rest.sum() > 0 else p
            break
    from_last = ps[L] if happened.residual is None else happened.residual
    happened.u_last = u_verify[L]
    happened.last = drawn(from_last, u_verify[L])

    # x and the accepted drafts stay in the cache. `last` is x_n of the next step.
    cache.commit(1 + accepted)
    return happened


# ---------------------------------------------------------- the grid

SEEN, UNSEEN = "#", "."


def grid(names: list[str], heads: list[str], sees: Tensor, remarks: list[str]) -> list[str]:
    """Lines that show what the columns of a block see. heads: names for the top. sees (T,S): the
    block's slots are the last T of S; those before them are committed. remarks: ends of lines."""
    T = len(names)
    heads = ["cache", *heads]
    label = max(map(len, names))
    width = max(map(len, heads))
    lines = [" " * label + "  " + " ".join(head.center(width) for head in heads)]
    for name, row, remark in zip(names, sees.tolist(), remarks):
        committed, block = row[:-T], row[-T:]
        marks = [all(committed) and len(committed) > 0, *block]
        cells = " ".join((SEEN if mark else UNSEEN).center(width) for mark in marks)
        lines.append(f"{name.ljust(label)}  {cells}  {remark}")
    return [line.rstrip() for line in lines]


# ------------------------------------------------------ what is shown

Line = list[tuple[str, str]]  # pieces of a line: text, and what it is


def number(value: float) -> str:
    """A probability, with two digits that count."""
    if value >= 0.01 or value == 0:
        return f"{value:.3f}"
    return f"{value:.4f}" if value >= 0.001 else f"{value:.1e}"


KEPT, OVERWRITTEN = "kept in the cache", "not kept: the next pass writes over it"


class Story:
    """Tells steps as lines."""

    def __init__(self, tokenizer: Tokenizer, prompt: str):
        self.tokenizer = tokenizer
        self.text = [(prompt, "prompt")]
        self.stream = tokenizer.stream()

    def word(self, token: int) -> str:
        """A token as Python shows it."""
        return repr(self.tokenizer.decode([token]))

    def step(self, n: int, h: Happened, brief: bool = False) -> list[Line]:
        """All that is told of step n; or, in brief, how its drafts were judged."""
        if brief:
            where = (f"After {self.word(h.x_n)} the model itself drew {self.word(h.x)}. The drafts "
                     f"for the tokens after it:")
            return [[(where, "told")], *self.verdicts(h)]
        L = len(h.drafts)
        accepted = sum(draft.verdict == "accepted" for draft in h.drafts)
        names = ["x_n", *(f"LA_{j}" for j in range(1, 1 + L))]
        remarks = [f"at position {h.position}; {KEPT}"]
        for j in range(1, 1 + L):
            remarks.append(f"at position {h.position + j}; {OVERWRITTEN}")
        first = grid(names, names, h.sees_1, remarks)
        names = ["x_{n+1}", *(f"d_{j}" for j in range(1, 1 + L))]
        remarks = []
        for i in range(1 + L):
            fate = KEPT if i <= accepted else OVERWRITTEN
            remarks.append(f"at position {h.position + 1 + i}; {fate}")
        second = grid(names, names, h.sees_2, remarks)
        guesses = [f"d_{j} = {self.word(draft.token)}" for j, draft in enumerate(h.drafts, 1)]
        plain = [
            f"STEP {n}. {h.position} tokens are in the cache; x_n is {self.word(h.x_n)}.", "",
            f"Pass 1 runs x_n and {L} look-ahead tokens. Each sees the columns marked {SEEN}:",
            "", *first, "",
            f"x_n yields x_{{n+1}} = {self.word(h.x)}, drawn from the model's own p, where it has "
            f"{number(h.p_next)}.",
            "Each column yields the token after its own place. LA_j stands in that of x_{n+j}, and",
            "has not seen it. So it guesses the token after that:",
            f"{', '.join(guesses)}.", "",
            "Pass 2 runs x_{n+1} and the drafts, as if they were the text:", "", *second, ""]
        lines = [[(text, "told")] for text in plain]
        return [*lines, *self.verdicts(h), *self.ending(h, accepted)]

    def verdicts(self, h: Happened) -> list[Line]:
        """How each draft was judged, and where the last token comes from."""
        words = [self.word(draft.token) for draft in h.drafts]
        width = max(map(len, words))
        lines = [[(f"{'draft'.ljust(4 + width)}       q       p     p/q       u   "
                   f"accept while u < p/q", "told")]]
        for j, (draft, word) in enumerate(zip(h.drafts, words), 1):
            cells = [number(draft.q), "", "", ""]
            if draft.verdict != "not judged":
                quotient = min(draft.p / draft.q, 999)
                cells[1:] = [number(draft.p), f"{quotient:.2f}", number(draft.u)]
            row = " ".join(cell.rjust(7) for cell in cells)
            lines.append([(f"d_{j} {word.ljust(width)} {row}   {draft.verdict}", draft.verdict)])
        told = "No draft was rejected: one token more is drawn from p after the last of them."
        likely = ""
        if h.residual is not None:
            told = ("In place of the rejected draft a token is drawn from what is left of p, "
                    "max(0, p - q) normalised:")
            shares, tokens = h.residual.topk(3)
            likely = ", ".join(f"{self.word(int(token))} {number(float(share))}"
                               for share, token in zip(shares, tokens) if share > 0) + ", ..; "
        drawn = f"{likely}by u = {number(h.u_last)} it is {self.word(h.last)}"
        if h.residual is not None:
            drawn += f", which has {number(float(h.residual[h.last]))}"
        return [*lines, [], [(told, "told")], [(f"{drawn}.", "told")], []]

    def ending(self, h: Happened, accepted: int) -> list[Line]:
        """The text, and what the step gained."""
        new = [(h.x, "own")]
        new += [(draft.token, "accepted") for draft in h.drafts[:accepted]]
        new.append((h.last, "own"))
        self.text += [(self.stream(token), kind) for token, kind in new]
        lines = [[(f"Two passes gave {len(new)} tokens, {accepted} of them accepted drafts. "
                   f"The text so far, these marked:", "told")], []]
        lines.append([("  | ", "told")])
        for text, kind in self.text:
            for i, part in enumerate(text.split("\n")):
                if i:
                    lines.append([("  | ", "told")])
                lines[-1].append((part, kind))
        return [*lines, []]


def painted(line: Line, colour: bool) -> str:
    """A line for the terminal: green is accepted, red rejected; in a pipe accepted tokens stand in
    brackets."""
    codes = {"accepted": "32", "rejected": "31", "prompt": "2", "not judged": "2"}
    text = ""
    for part, kind in line:
        part = visible(part)
        if colour and part and kind in codes:
            text += f"\033[{codes[kind]}m{part}\033[0m"
        elif kind == "accepted" and len(line) > 1:
            text += f"[{part}]"
        else:
            text += part
    return text.rstrip()


# ----------------------------------------------------- command line

def walk(model: Llama, lookahead: Lookahead, params: Params, prompt: list[int], steps: int,
         seed: int) -> Iterator[Happened]:
    """The steps of one text, one after the other."""
    embeddings = lookahead.ready(model).embeddings
    L = len(embeddings)
    cache = Cache(model, 1, len(prompt) + steps * (2 + L) + 1 + L)
    if len(prompt) > 1:
        model(torch.tensor([prompt[:-1]]), cache)
        cache.commit(len(prompt) - 1)
    x_n = prompt[-1]
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        u = torch.zeros(2 * L + 2, dtype=torch.float64).uniform_(generator=generator)
        happened = step(model, embeddings, params, x_n, cache, u.tolist())
        x_n = happened.last
        yield happened


def parse(parser: ArgumentParser | None = None) -> Namespace:
    """The command line. parser: with more words than those here."""
    parser = parser or new_parser(__doc__)
    add = parser.add_argument
    add_common(add, model_required=False)
    add("--lookahead", metavar="FILE|unk|mean", help="of the paper's kind (default: demo/model's)")
    add("--length", type=int, default=3, help="look-ahead tokens of FILE (default: 3)")
    add("--prompt", default="class Reader:\n    def __init__(self", help="text to continue")
    add_chat(add)
    add_params(add, Params)
    add("--steps", type=int, default=3, help="(default: 3)")
    add("--brief", action="store_true", help="show only how the drafts were judged")
    parser.set_defaults(temperature=1.0)
    args = parser.parse_args()
    own = Path(__file__).resolve().parent / "model"
    if args.lookahead is None:
        args.lookahead = "mean" if args.model else own / "paper.safetensors"
    args.model = args.model or own
    args.device = args.device or "cpu"
    check_seed(args.seed)
    check_number("steps", args.steps, 1000)
    return args


@torch.inference_mode()
def tell(args: Namespace) -> Iterator[list[Line]]:
    """The lines of each step, when it has happened."""
    params = read_params(args, Params)
    model, tokenizer = load_model(args)
    lookahead = load_lookahead(args.lookahead, model, args.length, tokenizer)
    if type(lookahead) is not Lookahead:
        raise InputError(f"{args.lookahead} has more than the paper's embeddings, which are all "
                         f"that is shown here")
    prompt = encode_prompt(args, args.prompt, tokenizer)
    room = model.config.context - args.steps * (2 + len(lookahead.embeddings))
    if room <= len(prompt):
        raise InputError(f"{args.steps} steps after {len(prompt)} tokens are more than the model's "
                         f"context of {model.config.context}: ask for fewer --steps")
    check_prompts([prompt], args.steps, model.config.vocab_size, room)
    story = Story(tokenizer, "" if args.chat else args.prompt)
    steps = walk(model, lookahead, params, prompt, args.steps, args.seed)
    for n, happened in enumerate(steps, 1):
        yield story.step(n, happened, args.brief)


def main() -> None:
    colour = has_colour()
    for lines in tell(parse()):
        for line in lines:
            print(painted(line, colour))


if __name__ == "__main__":
    run_script(main)
