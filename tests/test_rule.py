"""The rejection rule gives exactly p: by enumeration, not by sampling, through the code that the sampler runs.

`draw` and `verify` are piecewise constant in their uniforms. Where p and q are multiples of 1/4, every threshold (p/q, or a
cumulative share of a residual) is a multiple of 1/12, so the average over one uniform from each twelfth *is* the integral. It is
taken twice, over the beginnings and over the ends of the twelfths: a threshold that has moved ever so little shows in one of them.
"""
import itertools
from dataclasses import astuple

import torch

import naive
from common import CODE, ends
from pass_sampler import Params, draw, probs

SIMPLEX = [torch.tensor(c, dtype=torch.float64) / 4 for c in itertools.product(range(5), repeat=3) if sum(c) == 4]  # V = 3
ONE = [(torch.stack([p, bonus]), q[None]) for p in SIMPLEX for q in SIMPLEX for bonus in SIMPLEX[5:7]]
TWO = [(torch.stack([SIMPLEX[i] for i in (a, b, 7)]), torch.stack([SIMPLEX[j] for j in (c, d)]))
       for a, b, c, d in [(4, 9, 6, 4), (12, 3, 5, 10), (8, 8, 8, 2), (6, 11, 13, 7), (1, 4, 4, 1), (3, 7, 12, 4)]]


def output_distribution(verify, p, q, grid):
    """Exact distribution of (accepted drafts, next token): p (L+1,V), q (L,V) -> {(token, ...): probability}."""
    L, V = q.shape
    drafts = torch.tensor(list(itertools.product(range(V), repeat=L))).view(V ** L, L)
    weight = q.gather(1, drafts.T).prod(0) if L else torch.ones(1, dtype=torch.float64)
    drafts, weight = drafts[weight > 0], weight[weight > 0]
    u = torch.cartesian_prod(*[grid] * (L + 1)).view(-1, L + 1)
    B, n = len(drafts) * len(u), len(u)
    accepted, last = verify(p.expand(B, -1, -1), q.expand(B, -1, -1), drafts.repeat_interleave(n, 0), u.repeat(len(drafts), 1))
    total = {}
    drafts, weight = drafts.repeat_interleave(n, 0), weight.repeat_interleave(n)
    for d, a, y, w in zip(drafts.tolist(), accepted.tolist(), last.tolist(), weight.tolist()):
        key = (*d[:a], y)
        total[key] = total.get(key, 0) + w / n
    return total


def check_rule(code, cases=ONE + TWO):
    """Whatever is kept, each token must have the probability p given those before it."""
    for (p, q), grid in itertools.product(cases, ends(12)):
        total = output_distribution(code.pass_sampler.verify, p, q, grid)
        for i in range(len(p)):
            # Texts that reach position i: those of more than i tokens. Given the first i, the next must be distributed as p_i.
            reached = {}
            for text, w in total.items():
                if len(text) > i:
                    reached.setdefault(text[:i], torch.zeros(p.shape[1], dtype=torch.float64))[text[i]] += w
            for before, weights in reached.items():
                share = weights / weights.sum()
                where = "after all drafts, which were accepted (the bonus token)" if i == len(q) else f"of draft {i + 1}"
                assert (share - p[i]).abs().max() <= 1e-12, (
                    f"in the place {where}, after {list(before)}, the output is distributed as "
                    f"{share.round(decimals=6).tolist()}, but the target is p = {p[i].tolist()} (p of all places: {p.tolist()}, "
                    f"drafts from q = {q.tolist()}): the rejection rule of Leviathan et al. is broken")


def test_rule_is_exact():
    """All p and q in quarters over three tokens, zeros and one-hots among them: L = 1, then L = 2, then no draft at all."""
    check_rule(CODE)
    check_rule(CODE, [(p[None], torch.zeros(0, 3, dtype=torch.float64)) for p in SIMPLEX])


def check_zeros(code):
    """At either end of the uniforms: no draft of p = 0 is kept, and nothing of probability 0 is drawn."""
    p = torch.tensor([[[0, 0.5, 0, 0.5, 0], [0, 0, 1, 0, 0]]], dtype=torch.float64)
    q = torch.tensor([[[0.25, 0.5, 0.25, 0, 0]]], dtype=torch.float64)
    for u in itertools.product((0, 1 - 2 ** -53), repeat=2):
        for draft in range(3):
            accepted, last = code.pass_sampler.verify(p, q, torch.tensor([[draft]]), torch.tensor([u], dtype=torch.float64))
            assert not accepted or p[0, 0, draft] > 0, f"u = {u}: a draft of p = 0 was kept"
            allowed = p[0, 1] if accepted else (p[0, 0] - q[0, 0]).clamp(min=0)
            assert allowed[last] > 0, f"u = {u}: token {last.item()} came out, of which the residual has {allowed[last].item()}"


def test_zeros():
    check_zeros(CODE)


def test_draw_is_exact_and_never_takes_a_zero():
    for weights in ([0, 1, 2, 0, 1], [0, 0, 4, 0, 0], [1, 1, 1, 1, 0]):
        p = torch.tensor(weights, dtype=torch.float64)
        for grid in ends(12):
            assert torch.equal(draw(p.expand(12, 5), grid).bincount(minlength=5) / 12, p / 4)
        extremes = draw(p.expand(2, 5), torch.tensor([0, 1 - 2 ** -53], dtype=torch.float64))
        assert (p[extremes] > 0).all()


PARAMS = [Params(0), Params(1), Params(0.5), Params(2, top_k=3), Params(1, top_p=0.7), Params(0.7, 4, 0.8), Params(1, 100, 1.0),
          Params(1, 1), Params(1e-9), Params(1e9)]


def check_probs(code):
    logits = torch.randn(40, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2
    logits[1, 3:6] = logits[1, 2]  # ties at the k-th logit and at the threshold of top-p
    logits[2] = 0
    logits[3, :4] = -1e30
    for params in PARAMS:
        expected = torch.tensor([naive.probs(row, *astuple(params)) for row in logits.tolist()], dtype=torch.float64)
        probs = code.pass_sampler.probs
        torch.testing.assert_close(probs(logits, params), expected, atol=1e-12, rtol=1e-9, msg=lambda text: f"{params}: {text}")
        low = probs(logits.bfloat16(), params)
        assert low.dtype == torch.float32 and torch.equal(low, probs(logits.bfloat16().float(), params))


def test_probs_equals_the_definition():
    check_probs(CODE)


def test_top_p_follows_temperature_and_keeps_the_token_that_crosses():
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()
    assert probs(logits, Params(1, top_p=0.6)).count_nonzero() == 2
    assert probs(logits, Params(0.1, top_p=0.6)).count_nonzero() == 1
    assert probs(logits, Params(1, top_p=0.5)).count_nonzero() == 1
    assert probs(logits, Params(1, top_k=3)).count_nonzero() == 4  # the third and the fourth tie
