"""Everything that a sampler may do, and how probable it is: not sampled but enumerated, through the code that runs.

Chance enters the sampler in four functions only: `draw`, `verify`, `verify_tree`, `without_replacement`. Each is run as it is, but on
chosen random numbers: its outcome is constant between thresholds, so one uniform from every cell between them, weighted with
the cell's size, gives all its outcomes and their exact probabilities. (It is run at both ends of every cell: outcomes that differ
betray a threshold that is not where it should be.) `every_outcome` then runs the generation once for each way that chance can
take. What comes out is compared with tests/naive.py.
"""
import itertools
import math

import torch

import naive

TOLERANCE = 1e-6  # the angles of the rotary positions are float32
CHANCE = ("draw", "verify", "verify_tree", "without_replacement")
ROW = 1  # of a ragged batch of two, the one whose chances are enumerated; the other takes the middle of every uniform


class Chance:
    """One way through all choices: repeats `path`, then takes the first outcome of every new choice."""

    def __init__(self, path):
        self.path, self.sizes, self.weight = list(path), [], 1.0

    def choose(self, outcomes):
        """outcomes {outcome: probability}; returns one of them."""
        outcomes = [(outcome, w) for outcome, w in outcomes.items() if w > 1e-15]
        if len(self.sizes) == len(self.path):
            self.path.append(0)
        outcome, w = outcomes[self.path[len(self.sizes)]]
        self.sizes.append(len(outcomes))
        self.weight *= w
        return outcome


def every_outcome(run):
    """{outcome: probability} of run(chance)."""
    total, path = {}, []
    while True:
        chance = Chance(path)
        outcome = run(chance)
        total[outcome] = total.get(outcome, 0) + chance.weight
        path = chance.path
        while path and path[-1] + 1 == chance.sizes[len(path) - 1]:
            path.pop()
        if not path:
            return total
        path[-1] += 1


def cells(*thresholds):
    """Beginning, end, both a little inside, and size of the cells into which thresholds cut [0, 1)."""
    cuts = [0.0]
    for t in sorted(t for ts in thresholds for t in ts):
        if cuts[-1] + 1e-7 < t < 1 - 1e-7:  # of those that are as good as one, only the first
            cuts.append(t)
    cuts, little = [*cuts, 1.0], 2e-7
    return [(min(a + little, (a + b) / 2), max(b - little, (a + b) / 2), b - a) for a, b in zip(cuts, cuts[1:])]


def at_both_ends(run, corners, what, *given):
    """run(uniforms (n, number of uniforms)) at the beginnings and at the ends of cells, [[(beginning, end, size), ..], ..] ->
    {outcome: probability}. what, given: words and tensors for a failure."""
    first, other = (run(torch.tensor([[cell[end] for cell in corner] for corner in corners], dtype=torch.float64))
                    for end in (0, 1))
    for one, two, corner in zip(first, other, corners):
        assert one == two, (
            f"{what} {', '.join(str(x.double().round(decimals=4).tolist()) for x in given)}: uniforms from "
            f"{[round(cell[0], 4) for cell in corner]} to {[round(cell[1], 4) for cell in corner]} lie between the thresholds that the "
            "method has (p/q to accept; the cumulative shares of p, or of the residual max(0, p - q), to draw), and should lead to "
            f"one outcome, but lead to {one} and to {two}")
    outcomes = {}
    for outcome, corner in zip(first, corners):
        outcomes[outcome] = outcomes.get(outcome, 0) + math.prod(size for *_, size in corner)
    return outcomes


def cumulative(weights):
    total = sum(weights)
    return [c / total for c in itertools.accumulate(weights)] if total else []


def left_of(p, q):
    rest = [max(0.0, a - b) for a, b in zip(p, q)]
    return [r / sum(rest) for r in rest] if sum(rest) > 1e-15 else p


def enumerated(module, real, chance):
    """Replacements for the module's functions of chance, {name: real function}, that ask `chance` for row ROW."""
    used = set()

    def is_new(u):
        """The uniforms themselves are not used here, so a sampler that used one twice would not show."""
        numbers = u.flatten().tolist()
        assert len(set(numbers)) == len(numbers) and used.isdisjoint(numbers), "a random number is used for two decisions"
        used.update(numbers)

    def draw(p, u):
        is_new(u)
        tokens = real["draw"](p, torch.full_like(u, 0.5))
        for i, weights in enumerate(p[ROW].reshape(-1, p.shape[-1])):
            corners = [[cell] for cell in cells(cumulative(weights.tolist()))]
            tokens[ROW].view(-1)[i] = chance.choose(at_both_ends(
                lambda u: real["draw"](weights.expand(len(u), -1), u[:, 0]).tolist(), corners, "draw from", weights))
        return tokens

    def judge(name, rows, grids, u, *before):
        """Run a rule on all cells of row ROW; elsewhere in the middle."""
        is_new(u)

        def run(u):
            kept, last = real[name](*before, *[x[ROW].expand(len(u), *x.shape[1:]) for x in rows], u)
            return list(zip(kept.tolist(), last.tolist()))
        module.draw = real["draw"]  # which the rule calls itself
        try:
            outcomes = at_both_ends(run, list(itertools.product(*grids)), f"{name} (accepted, and the token after), p, q, drafts =",
                                    *[x[ROW] for x in rows])
            kept_all, last_all = real[name](*before, *rows, torch.full_like(u, 0.5))
        finally:
            module.draw = draw
        kept_all[ROW], last_all[ROW] = map(torch.tensor, chance.choose(outcomes))
        return kept_all, last_all

    def verify(p, q, drafts, u):
        ps, qs, ds = p[ROW].tolist(), q[ROW].tolist(), drafts[ROW].tolist()
        grids = [cells([pi[d] / qi[d]] if qi[d] else []) for pi, qi, d in zip(ps, qs, ds)]
        last = cells(*[cumulative(left_of(pi, qi)) for pi, qi in zip(ps, qs)], cumulative(ps[-1]))
        return judge("verify", (p, q, drafts), [*grids, last], u)

    def verify_tree(parent, p, q, tokens, u):
        ps, qs, ts = p[ROW].tolist(), q[ROW].tolist(), tokens[ROW].tolist()
        rest, grids = dict(enumerate(ps)), []
        last = [cumulative(pi) for pi in ps]
        for i, above in enumerate(parent, 1):
            grids.append(cells([rest[above][ts[i]] / qs[i][ts[i]]] if qs[i][ts[i]] else []))
            rest[above] = left_of(rest[above], qs[i])
            last.append(cumulative(rest[above]))
        return judge("verify_tree", (p, q, tokens), [cells(*last), *grids], u, parent)

    def without_replacement(q, k, generator):
        """The real function with arrival times that bring about the order chosen: q / arrival is 1, 1/2, 1/3, .. in that order."""
        arrival = torch.ones(q.shape, dtype=torch.float64)
        for place in itertools.product(*[range(n) for n in q.shape[1:-1]]):
            weights, outcomes = q[ROW][place].tolist(), {}
            possible = sum(w > 0 for w in weights)
            for order in itertools.permutations([i for i, w in enumerate(weights) if w > 0], min(k, possible)):
                taken = [sum(weights) - sum(weights[token] for token in order[:i]) for i in range(len(order))]
                outcomes[order] = math.prod(weights[token] / max(rest, weights[token]) for token, rest in zip(order, taken))
            order = chance.choose(outcomes)
            times = q[ROW][place].double() * 99
            for rank, token in enumerate(order, 1):
                times[token] = weights[token] * rank
            arrival[ROW][place] = times.clamp(min=1e-300)
        exponential, torch.Tensor.exponential_ = torch.Tensor.exponential_, lambda self, generator=None: self.copy_(arrival)
        try:
            return real["without_replacement"](q, k, generator)
        finally:
            torch.Tensor.exponential_ = exponential
    return {"draw": draw, "verify": verify, "verify_tree": verify_tree, "without_replacement": without_replacement}


class Enough(Exception):
    """The texts that are compared are complete."""


def sampled(module, model, prompt, method, lookahead, params, n, room=4, **more):
    """{((token, was it an accepted draft?), ..): probability} of the first n of n + room tokens after `prompt`, beside a longer row."""
    real = {name: getattr(module, name) for name in CHANCE}

    def run(chance):
        text = []

        def on_token(row, token, from_draft):
            if row == ROW:
                text.append((token, from_draft))
                if len(text) == n or token in model.config.stop_tokens:
                    raise Enough
        vars(module).update(enumerated(module, real, chance))
        try:
            module.generate(model, [[0, 1, 2, 0, 1], prompt], method, lookahead, params, n + room, on_token=on_token, **more)
        except Enough:
            pass
        finally:
            vars(module).update(real)
        return tuple(text)
    with torch.inference_mode():
        return every_outcome(run)


def check_exact(code, method, settings=(1.0,), n=2, parts=(), stop=(), drafts=True, room=4, **more):
    """The distribution of the first n tokens is that of the chain rule, p(x_1) p(x_2 | x_1) .., by tests/naive.py; and a second
    token that is an accepted draft has probability min(p, q): drafts come from the look-ahead that was asked for."""
    module, params, prompt = code.pass_sampler, code.pass_sampler.Params(*settings), [2, 0, 1]
    model = code.tiny(3, seed=3, stop=stop)
    lookahead = code.random_lookahead(model, 2, parts) if method in module.LOOKS_AHEAD else None
    judge = naive.Model(model, lookahead)
    outcomes = sampled(module, model, prompt, method, lookahead, params, n, room, **more)
    texts = {}
    for text, w in outcomes.items():
        tokens = tuple(token for token, _ in text)
        texts[tokens] = texts.get(tokens, 0) + w
    expected = {(): 1.0}
    for _ in range(n):
        ended = {text: w for text, w in expected.items() if text and text[-1] in stop}
        expected = ended | {text + (token,): w * p for text, w in expected.items() if text not in ended for token, p in enumerate(
            naive.probs(judge.next_logits(prompt + list(text)), *settings)) if p}
    for text in sorted(set(expected) | set(texts)):
        assert abs(texts.get(text, 0) - expected.get(text, 0)) < TOLERANCE, (
            f"{method}: after {prompt} the text {list(text)} comes with probability {texts.get(text, 0):.6f}, but the model says "
            f"{expected.get(text, 0):.6f} (the chain rule): the output does not follow the model. All texts: {texts}, by the model: "
            f"{expected}")
    if lookahead is None or not drafts:
        return
    for x, first in enumerate(naive.probs(judge.next_logits(prompt), *settings)):
        if not first or x in stop:
            continue
        p = naive.probs(judge.next_logits(prompt + [x]), *settings)
        q = naive.probs(judge.draft_logits(prompt, [x]), *settings)
        for y in range(3):
            got = sum(w for text, w in outcomes.items() if text[:2] == ((x, False), (y, True)))
            assert abs(got - first * min(p[y], q[y])) < TOLERANCE, (
                f"{method}: after {prompt} and {x} the draft {y} is accepted with probability {got / first:.6f}, but min(p, q) = "
                f"{min(p[y], q[y]):.6f}: drafts do not come from the look-ahead's distribution q")


def check_later_drafts(code, settings=(1.0, 2)):
    """The drafts of `fused` in the second pass, tree "0", follow the draft that was accepted, or the token drawn in its place:
    with probability p(x) min(p, q)(d) p(y) min(p, q)(z) the text is x, an accepted d, y, an accepted z; and
    with p(x) max(0, p - q)(d) min(p, q)(y) it is x, d in place of a rejected draft, an accepted y."""
    prompt, model = [2, 0, 1], code.tiny(3, seed=3)
    lookahead, params = code.random_lookahead(model, 1), code.pass_sampler.Params(*settings)
    judge, got = naive.Model(model, lookahead), {}
    for text, w in sampled(code.pass_sampler, model, prompt, "fused", lookahead, params, 4, tree="0").items():
        for n in (3, 4):
            got[text[:n]] = got.get(text[:n], 0) + w

    def p(*text):
        return naive.probs(judge.next_logits(prompt + list(text)), *settings)

    def q(*text):
        return naive.probs(judge.draft_logits(prompt + list(text[:-1]), text[-1:]), *settings)

    for x, d, y in itertools.product(range(3), repeat=3):
        replaced = p()[x] * max(0.0, p(x)[d] - q(x)[d]) * min(p(x, d)[y], q(x, d)[y])
        accepted = {z: p()[x] * min(p(x)[d], q(x)[d]) * p(x, d)[y] * min(p(x, d, y)[z], q(x, d, y)[z]) for z in range(3)}
        for text, expected in [(((x, False), (d, False), (y, True)), replaced)] + [
                (((x, False), (d, True), (y, False), (z, True)), w) for z, w in accepted.items()]:
            assert abs(got.get(text, 0) - expected) < TOLERANCE, (
                f"fused: {text} (token, accepted draft?) comes with probability {got.get(text, 0):.6f}, not {expected:.6f}: the "
                f"drafts of the second pass do not follow the text")
