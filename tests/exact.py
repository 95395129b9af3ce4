"""Everything that a step may do, and how probable it is: not sampled but enumerated.

All chance enters a step through its uniforms. The outcome of a step depends on a uniform only
through comparisons with thresholds: p/q to accept, or the cumulative shares of what is drawn from.
tests/naive.py has each method as an algorithm that says where its thresholds are. `every_path`
follows the algorithm through all choices that chance can make. Each path is a box: an interval for
each uniform that the path uses; the box's volume is the probability of the path.

Then the step that the samplers run is run on a batch with a row for each box, once with the
uniforms near the lower ends of the intervals and once near the upper. From outcomes and volumes
`check_exact` adds up the distribution of the text, and compares it with the chain rule,
p(x_1) p(x_2 | x_1) .., of the naive model.

An example, a step of `fused` with V = 2 and L = 1, where q = (.5, .5) and p = (.8, .2), and p' is
what follows the draft. The algorithm draws the draft by u_0, judges it by u_1, draws the last token
by u_2:

    path                             u_0       u_1       u_2            probability
    draft 0, accepted, then 0        [0, .5)   [0, 1)    [0, p'(0))     .5 p'(0)
    draft 0, accepted, then 1        [0, .5)   [0, 1)    [p'(0), 1)     .5 p'(1)
    draft 1, accepted, then 0 or 1   [.5, 1)   [0, .4)   as above       .2 together
    draft 1, rejected, then 0        [.5, 1)   [.4, 1)   [0, 1)         .3, the residual is (1, 0)

Token 0 comes first with .5 + .3 = .8, and token 1 with .2: that is p. A step that, say, drew from p
after the rejection would give token 1 in the last box for u_2 near 1, and token 0 for u_2 near 0:
two outcomes in one box, which is what `compare_ends` reports.
"""
import inspect
from functools import cache

import naive
import torch
from common import REAL, options_of

from support.text import rows_of

TOLERANCE = 1e-6  # of a probability, given the text before it
# Rarer texts are not judged: thresholds are off by 1e-8 or so, since angles are float32, and that
# is divided by the probability of the text.
LEAST = 1e-4
INSIDE = 1e-5  # How far inside an interval: angles of rotary positions are float32.
PROMPTS = [[2, 0, 1], [0, 1, 2, 0, 1], [1]]  # Rows of different lengths stand in one batch.


class Path:
    """One way through all choices: it repeats `choices`, then takes the first outcome of each."""

    def __init__(self, choices):
        self.choices = list(choices)
        self.branching = []  # how many outcomes each choice had
        self.intervals = {}  # {uniform: (low, high)}
        self.probability = 1.0

    def choose(self, i, weights):
        """An outcome, an index into weights, that uniform i decides."""
        possible = [k for k, w in enumerate(weights) if w > 1e-12]
        made = len(self.branching)
        if made == len(self.choices):
            self.choices.append(0)
        k = possible[self.choices[made]]
        self.branching.append(len(possible))
        assert i not in self.intervals, f"the algorithm uses uniform {i} twice"
        low = sum(weights[:k])
        self.intervals[i] = (low, low + weights[k])
        self.probability *= weights[k]
        return k


def every_path(run):
    """[(what run(path) returned, the path)] for every way that chance can take."""
    found = []
    choices = []
    while True:
        path = Path(choices)
        found.append((run(path), path))
        choices = path.choices
        while choices and choices[-1] + 1 == path.branching[len(choices) - 1]:
            choices.pop()
        if not choices:
            return found
        choices[-1] += 1


@cache
def judge(parts, seed=3):
    """The naive model, with a look-ahead of these parts: one for all tests, as it remembers."""
    llama = REAL.tiny(3, seed=seed)
    return naive.Model(llama, None if parts is None else REAL.random_lookahead(llama, 3, parts))


def algorithm(method, parts, shape):
    """The step of tests/naive.py as a function (text, settings, choose, cold). shape: L, or the
    paths of a tree."""
    step = naive.parallel if method == "pass" else getattr(naive, method.replace("-", "_"))
    names = inspect.signature(step).parameters
    words = {}
    if "L" in names:
        words["L"] = shape
    if "paths" in names:
        words["paths"] = shape.split()
    if "small" in names:
        words["small"] = judge(None, 9)
    return lambda *more: step(judge(parts), *more, **words)


def real_options(code, llama, method, parts, shape):
    """The options of the method that is judged, as `algorithm` has them."""
    names = options_of(method, code.pass_sampler)
    words = {}
    if "lookahead" in names:
        L = None if "tree" in names else shape
        words["lookahead"] = code.random_lookahead(llama, 3, parts, keep=L)
    if "tree" in names:
        words["tree"] = shape
    if "length" in names:
        words["length"] = shape
    if "draft_model" in names:
        words["draft_model"] = code.tiny(3, seed=9)
    return words


def run_boxes(code, method, params, parts, shape, prompts, uniforms):
    """Run steps, on random models of three tokens. uniforms: per row and step {number: value}.
    Returns, per row, a list over steps of the tokens that each step made."""
    llama = code.tiny(3, seed=3)
    words = real_options(code, llama, method, parts, shape)
    steps = len(uniforms[0])
    s = code.pass_sampler.Sampler(llama, method, params, len(prompts), 5 + 5 * steps, **words)
    outcomes = [[] for _ in prompts]
    with torch.inference_mode():
        s.alive.fill_(1)
        s.prefill(prompts)
        for step in range(steps):
            s.u.fill_(0.5)
            chosen = [(row, i, value) for row, of_row in enumerate(uniforms)
                      for i, value in of_row[step].items()]
            row, i, value = zip(*chosen)
            s.u[list(row), list(i)] = torch.tensor(value, dtype=torch.float64)
            for row, made in enumerate(rows_of(s.advance(), s.step.drafts)):
                outcomes[row].append(made.tokens)
    return outcomes


def check_exact(code, method, settings=(1.0,), parts=(), shape=2, steps=1):
    """`steps` steps after PROMPTS (several: after the last two), in one batch, by uniforms from
    every box.

    1. Both ends of a box have one outcome: thresholds are where the algorithm has them.
    2. After every text, the next token comes with the probability p of the naive model.
    3. Drafts are accepted with probability min(p, q), q being the naive look-ahead's.
    """
    params = code.pass_sampler.Params(*settings)
    step_of = algorithm(method, parts, shape)

    def run(path, prompt):
        text, made = list(prompt), []
        for step in range(steps):
            first, kept, last = step_of(
                text, settings, lambda i, w: path.choose((step, i), w), step == 0)
            made.append((first, kept, last))
            text = text + first + kept + [last]
        return made

    rows = []  # (prompt, what the algorithm made, path)
    for prompt in PROMPTS if steps == 1 else PROMPTS[1:]:
        rows += [(prompt, *found) for found in every_path(lambda path: run(path, prompt))]
    ends = []
    for upper in (False, True):
        uniforms = [within(path, steps, upper) for _, _, path in rows]
        prompts = [row[0] for row in rows]
        ends.append(run_boxes(code, method, params, parts, shape, prompts, uniforms))
    compare_ends(method, rows, *ends)
    compare_texts(method, settings, parts, rows, ends[0])
    if method != "autoregressive":
        compare_drafts(method, rows, ends[0])


def within(path, steps, upper):
    """Per step {uniform: value} of a box, near its upper corner or near its lower."""
    found = [{} for _ in range(steps)]
    for (step, i), (low, high) in path.intervals.items():
        inside = min(INSIDE, (high - low) / 4)
        found[step][i] = high - inside if upper else low + inside
    return found


def compare_ends(method, rows, low, high):
    """Raise AssertionError for the most probable box whose ends differ."""
    different = [i for i in range(len(rows)) if low[i] != high[i]]
    if not different:
        return
    i = max(different, key=lambda i: rows[i][2].probability)
    prompt, made, path = rows[i]
    box = {key: (round(a, 4), round(b, 4)) for key, (a, b) in path.intervals.items()}
    raise AssertionError(
        f"{method}, after {prompt}: {len(different)} of {len(rows)} boxes. Uniforms in {box}, "
        f"(step, number), lie between the thresholds that the method has (p/q to accept; the "
        f"cumulative shares of p, of q, or of the residual max(0, p - q) to draw), so there should "
        f"be one outcome, {made} (model's token, accepted drafts, last token, per step), but it is "
        f"{low[i]} at one end and {high[i]} at the other: a draw or the rejection rule is off, or "
        f"the drafts are others")


def compare_texts(method, settings, parts, rows, outcomes):
    """Raise AssertionError where, given a text, the next token does not follow p: the text that is
    farthest off. Texts less probable than LEAST are not judged."""
    reached = {}
    for (prompt, _, path), made in zip(rows, outcomes):
        text = tuple(sum(made, []))
        for i, token in enumerate(text):
            shares = reached.setdefault((tuple(prompt), text[:i]), [0.0] * 3)
            shares[token] += path.probability
    worst = (TOLERANCE, "")
    for (prompt, text), weights in reached.items():
        total = sum(weights)
        if total < LEAST:
            continue
        p = naive.probs(judge(parts).next_logits([*prompt, *text]), *settings)
        shares = [w / total for w in weights]
        off = max(abs(a - b) for a, b in zip(p, shares))
        if off > worst[0]:
            worst = (off, f"{method}: after {list(prompt)} + {list(text)} the next token is "
                     f"distributed as {[round(s, 6) for s in shares]}, but the model says "
                     f"{[round(v, 6) for v in p]}")
    assert not worst[1], (
        f"{worst[1]} (the text that is farthest off): the output does not follow the model. Either "
        f"the rule is not that of Leviathan et al., or it was given another p or q than the drafts "
        f"had, or the cache does not hold the text")


def compare_drafts(method, rows, outcomes):
    """Raise AssertionError where a draft is not accepted as often as the algorithm says."""
    expected, got = {}, {}
    for (prompt, made, path), tokens in zip(rows, outcomes):
        history = tuple(prompt)
        for (first, kept, last), real in zip(made, tokens):
            # What is accepted: all but the last token, after the model's own first one, if any.
            for table, drafts in ((expected, kept), (got, real[len(first):-1])):
                for n in range(1, 1 + len(drafts)):
                    key = (history, *first, *drafts[:n])
                    table[key] = table.get(key, 0.0) + path.probability
            history += (*first, *kept, last)
    off = {key: abs(expected.get(key, 0) - got.get(key, 0)) for key in expected | got}
    worst = max(off, key=off.get, default=None)
    assert not off or off[worst] < TOLERANCE, (
        f"{method}: after {list(worst[0])} the accepted drafts (and before them the model's token, "
        f"of pass) {list(worst[1:])} come with probability {got.get(worst, 0):.6f}, but min(p, q) "
        f"of the naive look-ahead gives {expected.get(worst, 0):.6f}: drafts are not drawn from "
        f"its q")
