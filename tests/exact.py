"""Everything that a step may do, and how probable it is: not sampled but enumerated.

All chance enters a step through its uniforms, and between thresholds (the cumulative shares of
what is drawn from, and p/q) its outcome is constant. tests/naive.py has each method as an
algorithm that says where its thresholds are. So `every_path` lists all ways that chance can take,
each a cell of uniforms with its size; then the step that the samplers run is run on a batch of all
cells, once at their lower ends and once at their upper. From the outcomes and the sizes
`check_exact` adds up the distribution of the text, and compares it with the chain rule,
p(x_1) p(x_2 | x_1) .., of the naive model.
"""
from functools import cache

import torch

import naive
from common import REAL

TOLERANCE = 1e-6
LITTLE = 1e-5  # how far inside a cell: angles of rotary positions are float32, residuals are small
PROMPTS = [[2, 0, 1], [0, 1, 2, 0, 1], [1]]  # rows of different lengths stand in one batch


class Path:
    """One way through all choices: repeats `taken`, then takes the first outcome of each choice."""

    def __init__(self, taken):
        self.taken, self.sizes, self.cells, self.weight = list(taken), [], {}, 1.0

    def choose(self, i, weights):
        """An outcome, an index into weights, that uniform i decides: the ends of its cell are
        kept."""
        possible = [k for k, w in enumerate(weights) if w > 1e-12]
        if len(self.sizes) == len(self.taken):
            self.taken.append(0)
        k = possible[self.taken[len(self.sizes)]]
        self.sizes.append(len(possible))
        low = sum(weights[:k])
        assert i not in self.cells, f"the algorithm uses uniform {i} twice"
        self.cells[i] = (low, low + weights[k])
        self.weight *= weights[k]
        return k


def every_path(run):
    """[(what run(path) returned, the path)] for every way that chance can take."""
    found, taken = [], []
    while True:
        path = Path(taken)
        found.append((run(path), path))
        taken = path.taken
        while taken and taken[-1] + 1 == path.sizes[len(taken) - 1]:
            taken.pop()
        if not taken:
            return found
        taken[-1] += 1


@cache
def judge(parts, seed=3):
    """The naive model, with a look-ahead of these parts: one for all tests, as it remembers."""
    llama = REAL.tiny(3, seed=seed)
    return naive.Model(llama, None if parts is None else REAL.random_lookahead(llama, 3, parts))


def algorithm(method, parts, shape):
    """The step of tests/naive.py as a function (text, settings, choose, cold)."""
    model, step = judge(parts), {"pass": naive.parallel}.get(method)
    step = step or getattr(naive, method.replace("-", "_"))
    words = {} if method == "autoregressive" else {"L": shape}
    if method == "tree":
        words = {"paths": shape.split()}
    if method == "draft-model":
        words["small"] = judge(None, 9)
    return lambda *more: step(model, *more, **words)


def run_cells(code, method, params, parts, shape, prompts, cells):
    """Run steps, on random models of three tokens and on chosen uniforms. cells: per row and step
    {uniform: value}. Returns, per row, a list over steps of the tokens that count."""
    llama, options = code.tiny(3, seed=3), {}
    if method in ("pass", "fused", "tree"):
        L = 3 if method == "tree" else shape
        options["lookahead"] = code.random_lookahead(llama, 3, parts, keep=L)
    if method == "tree":
        options["tree"] = shape
    if method == "draft-model":
        options = {"draft_model": code.tiny(3, seed=9), "length": shape}
    s = code.pass_sampler.Sampler(
        llama, method, params, len(prompts), 5 + 5 * len(cells[0]), **options)
    outcomes = [[] for _ in prompts]
    with torch.inference_mode():
        s.alive.fill_(1)
        s.prefill(prompts)
        for step in range(len(cells[0])):
            s.u.fill_(0.5)
            index = [(row, i) for row, cell in enumerate(cells) for i in cell[step]]
            values = [cells[row][step][i] for row, i in index]
            s.u[tuple(torch.tensor(index).T)] = torch.tensor(values, dtype=torch.float64)
            for row, (*tokens, count, finite) in enumerate(s.advance().tolist()):
                outcomes[row].append(tokens[:count])
    return outcomes


def check_exact(code, method, settings=(1.0,), parts=(), shape=2, steps=1):
    """`steps` steps after PROMPTS (several: after the last two), in one batch, by uniforms from
    every cell.

    1. Both ends of a cell have one outcome: thresholds are where the algorithm has them.
    2. After every text, the next token comes with the probability p of the naive model.
    3. Drafts are accepted with probability min(p, q), q being the naive look-ahead's.
    """
    params = code.pass_sampler.Params(*settings)
    algorithm_ = algorithm(method, parts, shape)

    def run(path, prompt):
        text, made = list(prompt), []
        for step in range(steps):
            first, kept, last = algorithm_(
                text, settings, lambda i, w: path.choose((step, i), w), step == 0)
            made.append((first, kept, last))
            text = text + first + kept + [last]
        return made

    rows = []  # (prompt, what the algorithm made, path)
    for prompt in PROMPTS if steps == 1 else PROMPTS[1:]:
        rows += [(prompt, *found) for found in every_path(lambda path: run(path, prompt))]
    ends = []
    for end in (0, 1):
        cells = []
        for _, _, path in rows:
            cell = [{} for _ in range(steps)]
            for (step, i), (low, high) in path.cells.items():
                inside = min(LITTLE, (high - low) / 4)
                cell[step][i] = high - inside if end else low + inside
            cells.append(cell)
        ends.append(run_cells(code, method, params, parts, shape, [row[0] for row in rows], cells))
    compare_ends(method, rows, *ends)
    compare_texts(method, settings, parts, rows, ends[0])
    if method != "autoregressive":
        compare_drafts(method, rows, ends[0])


def compare_ends(method, rows, low, high):
    """Raise AssertionError for the cell of most weight whose ends differ."""
    different = [i for i in range(len(rows)) if low[i] != high[i]]
    if not different:
        return
    i = max(different, key=lambda i: rows[i][2].weight)
    prompt, made, path = rows[i]
    cells = {key: (round(a, 4), round(b, 4)) for key, (a, b) in path.cells.items()}
    raise AssertionError(
        f"{method}, after {prompt}: {len(different)} of {len(rows)} cells. Uniforms in {cells}, "
        f"(step, number), lie between the thresholds that the method has (p/q to accept; the "
        f"cumulative shares of p, of q, or of the residual max(0, p - q) to draw), so there should "
        f"be one outcome, {made} (model's token, accepted drafts, last token, per step), but it is "
        f"{low[i]} at one end and {high[i]} at the other: a draw or the rejection rule is off, or "
        f"the drafts are others")


def compare_texts(method, settings, parts, rows, outcomes):
    """Raise AssertionError where the next token does not follow p: the text that is farthest
    off."""
    reached = {}
    for (prompt, _, path), made in zip(rows, outcomes):
        text = tuple(sum(made, []))
        for i, token in enumerate(text):
            shares = reached.setdefault((tuple(prompt), text[:i]), [0.0] * 3)
            shares[token] += path.weight
    worst = (TOLERANCE, "")
    for (prompt, text), weights in reached.items():
        total = sum(weights)
        if total < 1e-4:
            continue
        p = naive.probs(judge(parts).next_logits([*prompt, *text]), *settings)
        shares = [w / total for w in weights]
        off = max(abs(a - b) for a, b in zip(p, shares)) * total
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
                    table[key] = table.get(key, 0.0) + path.weight
            history += (*first, *kept, last)
    off = {key: abs(expected.get(key, 0) - got.get(key, 0)) for key in expected | got}
    worst = max(off, key=off.get, default=None)
    assert not off or off[worst] < TOLERANCE, (
        f"{method}: after {list(worst[0])} the accepted drafts (and before them the model's token, "
        f"of pass) {list(worst[1:])} come with probability {got.get(worst, 0):.6f}, but min(p, q) "
        f"of the naive look-ahead gives {expected.get(worst, 0):.6f}: drafts are not drawn from "
        f"its q")
