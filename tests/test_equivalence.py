"""The claim: PaSS draws from exactly the model's distribution, whatever its drafts are worth.

1. The rejection rule gives p: by enumeration of its uniforms.
2. So does each step of PaSS, from any state that a step can leave: by enumeration (tests/exact.py)
   against an implementation that shares nothing with this one (tests/naive.py).
3. So do whole texts with real random numbers, in ragged batches: by chi-square; greedy ones are
   equal.

What is beyond the paper is held to the same in tests/test_beyond.py.
"""
import itertools
from dataclasses import astuple
from functools import cache

import naive
import pytest
import torch
from common import ALPHA, REAL, check_power, options, options_of, p_value, tiny
from exact import check_exact

from pass_sampler import METHODS, Params, Sampler, generate

# ------------------------------------ 1. the rejection rule

# `verify` is constant between thresholds. Where p and q are multiples of 1/4, every threshold (p/q,
# or a cumulative share of a residual) is a multiple of 1/12, so the mean over one uniform from each
# twelfth is the integral. It is taken twice, near the beginnings and near the ends of the twelfths:
# a threshold that has moved ever so little shows in one of them.
QUARTERS = [c for c in itertools.product(range(5), repeat=3) if sum(c) == 4]
SIMPLEX = [torch.tensor(c, dtype=torch.float64) / 4 for c in QUARTERS]  # V = 3
ONE, TWO = [], []
for p, q, bonus in itertools.product(SIMPLEX, SIMPLEX, SIMPLEX[5:7]):
    ONE.append((torch.stack([p, bonus]), q[None]))
for a, b, c, d in [(4, 9, 6, 4), (12, 3, 5, 10), (8, 8, 8, 2), (6, 11, 13, 7), (1, 4, 4, 1)]:
    TWO.append((torch.stack([SIMPLEX[a], SIMPLEX[b], SIMPLEX[7]]),
                torch.stack([SIMPLEX[c], SIMPLEX[d]])))


def ends(n):
    """Uniforms from each n-th of [0, 1), (n,): a little after its beginning, and before its end."""
    return [(torch.arange(n, dtype=torch.float64) + inside) / n for inside in (1e-9, 1 - 1e-9)]


def output_distribution(verify, p, q, grid):
    """{(accepted drafts, next token): probability} for p (L+1,V), q (L,V), uniforms on a grid."""
    L, V = q.shape
    drafts = torch.tensor(list(itertools.product(range(V), repeat=L)))
    weight = q.gather(1, drafts.T).prod(0)
    drafts, weight = drafts[weight > 0], weight[weight > 0]
    u = torch.cartesian_prod(*[grid] * (L + 1))
    B, n = len(drafts) * len(u), len(u)
    drafts, weight = drafts.repeat_interleave(n, 0), weight.repeat_interleave(n)
    accepted, last = verify(
        p.expand(B, -1, -1), q.expand(B, -1, -1), drafts, u.repeat(B // n, 1))
    total = {}
    for d, a, y, w in zip(drafts.tolist(), accepted.tolist(), last.tolist(), weight.tolist()):
        key = (*d[:a], y)
        total[key] = total.get(key, 0) + w / n
    return total


def test_rule(code=REAL):
    """Whatever is kept, each token must have the probability p given those before it."""
    worst = (1e-12, "")
    for (p, q), grid in itertools.product(ONE + TWO, ends(12)):
        total = output_distribution(code.pass_sampler.verify, p, q, grid)
        for i in range(len(p)):
            # Texts that reach position i. Given the first i tokens, the next must follow p_i.
            reached = {}
            for text, w in total.items():
                if len(text) > i:
                    shares = reached.setdefault(text[:i], torch.zeros(3, dtype=torch.float64))
                    shares[text[i]] += w
            for before, weights in reached.items():
                share = weights / weights.sum()
                off = (share - p[i]).abs().max().item()
                if not off <= worst[0]:
                    where = f"of draft {i + 1}" if i < len(q) else "after all drafts (the bonus)"
                    share = share.round(decimals=6).tolist()
                    worst = (off, f"in the place {where}, after {list(before)}, the output is "
                             f"distributed as {share}, but the target is p = {p[i].tolist()} (all "
                             f"p: {p.tolist()}, all q: {q.tolist()})")
    assert not worst[1], f"{worst[1]}: the rejection rule of Leviathan et al. is broken"


def test_zeros(code=REAL):
    """At either end of the uniforms: no draft of p = 0 is kept, nothing of probability 0 is
    drawn."""
    p = torch.tensor([[[0, 0.5, 0, 0.5, 0], [0, 0, 1, 0, 0]]], dtype=torch.float64)
    q = torch.tensor([[[0.25, 0.5, 0.25, 0, 0]]], dtype=torch.float64)
    for u, draft in itertools.product(itertools.product((0, 1 - 2**-53), repeat=2), range(3)):
        accepted, last = code.pass_sampler.verify(
            p, q, torch.tensor([[draft]]), torch.tensor([u], dtype=torch.float64))
        assert not accepted or p[0, 0, draft] > 0, (
            f"u = {u}: a draft of p = 0 was kept, but accept while u < p/q (Leviathan et al.) says "
            f"never")
        allowed = p[0, 1] if accepted else (p[0, 0] - q[0, 0]).clamp(min=0)
        assert allowed[last] > 0, f"u = {u}: token {last.item()} came out, of residual 0"


# Settings of `Params` that steps are enumerated with; a new parameter needs values here. EXTREME
# ones are for `probs` alone.
SETTINGS = [(0.0,), (1.0,), (0.5,), (1.0, 2), (1.0, 0, 0.7), (0.7, 2, 0.8), (1.5, 2)]
EXTREME = [(1, 100, 1.0), (1, 1), (1e-9,), (1e9,), (1, 0, 1e-9), (2, 3), (0.7, 4, 0.8)]


def test_probs(code=REAL):
    """`probs` is the definition in tests/naive.py."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 8, generator=generator, dtype=torch.float64) * 2
    logits[1, 3:6] = logits[1, 2]  # ties at the k-th logit and at the threshold of top-p
    logits[2] = 0
    logits[3, :4] = -1e30
    for settings in SETTINGS + EXTREME:
        params = code.pass_sampler.Params(*settings)
        rows = [naive.probs(row, *settings) for row in logits.tolist()]
        expected = torch.tensor(rows, dtype=torch.float64)
        got = code.pass_sampler.probs(logits, params)
        torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-9, msg=lambda text: (
            f"{params}: {text}"))
        low = code.pass_sampler.probs(logits.bfloat16(), params)
        assert low.dtype == torch.float32
        assert torch.equal(low, code.pass_sampler.probs(logits.bfloat16().float(), params))


# --------------------------------- 2. steps, by enumeration

@pytest.mark.parametrize("method, L, settings, steps", [
    *[("autoregressive", 0, some, 3) for some in SETTINGS],
    *[("pass", L, some, 1) for L in (1, 2) for some in SETTINGS],
    # The second step finds what the first left: cache, x, and nothing of what was rejected.
    ("pass", 2, (1.0, 2), 2)], ids=str)
def test_steps(method, L, settings, steps):
    check_exact(REAL, method, settings, shape=L, steps=steps)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_exact(method):
    """A method that is new has this proof before it has any other."""
    shape = "0" if "tree" in options_of(method) else 1
    check_exact(REAL, method, (1.0,), ("memory", "head"), shape, steps=2)


# ----------------- 3. whole texts, with real random numbers

PROMPTS = [[1], [2, 3, 1], [0, 1, 2, 3, 3, 1, 2]]
ROWS, BATCHES = 300, 20  # 6,000 texts per test, a third after each prompt


@cache
def exact_texts(prompt, params, n):
    """{text: probability} of the texts of n tokens, fewer with a stop token at the end, after a
    prompt, by the chain rule and the naive model."""
    judge, texts = naive.Model(tiny(4, seed=3)), {(): 1.0}
    for _ in range(n):
        longer = {}
        for text, probability in texts.items():
            if text[-1:] == (0,):
                longer[text] = probability
                continue
            p = naive.probs(judge.next_logits([*prompt, *text]), *astuple(params))
            for token, share in enumerate(p):
                if share:
                    longer[*text, token] = probability * share
        texts = longer
    return texts


def joint_p_values(code, method, params, parts=(), seed=0, batches=BATCHES, **more):
    """p-values, one per prompt. Null hypothesis: texts of 5 tokens, fewer where 0 stops them, are
    independent draws from the model; 100 texts per prompt and batch. test_power says what deviation
    that finds. Many rows of each prompt stand in one batch and accept different numbers of
    drafts."""
    llama = code.tiny(4, seed=3, stop=(0,))
    words = options(method, llama, parts=parts) | more
    theirs = code.pass_sampler.Params(*astuple(params))
    sampler = code.pass_sampler.Sampler(llama, method, theirs, ROWS, 20, **words)
    texts = []
    for batch in range(batches):
        texts += sampler.generate(PROMPTS * (ROWS // 3), 5, seed + batch)["tokens"]
    return [p_value(texts[i::3], exact_texts(tuple(prompt), params, 5))
            for i, prompt in enumerate(PROMPTS)]


def check_joint(code, method, params, **more):
    for prompt, p in zip(PROMPTS, joint_p_values(code, method, params, **more)):
        assert p > ALPHA, (
            f"{method}, {params}: texts after {prompt} do not follow the model (p-value {p:.1e}): "
            f"rows or decisions share random numbers, or a row disturbs another")


@pytest.mark.parametrize("params", [Params(1), Params(0.7, 3, 0.8)], ids=str)
@pytest.mark.parametrize("method", ["autoregressive", "pass"])
def test_ragged_batches_follow_the_model(method, params):
    check_joint(REAL, method, params)


@pytest.mark.parametrize("n, params, shift", [
    (2000, Params(1), 0.14), (2000, Params(0.7, 3, 0.8), 0.12), (1000, Params(1), 0.2)], ids=str)
def test_power(n, params, shift):
    """The smallest deviation, in total variation, that these tests find with a power of 99 %."""
    check_power(exact_texts(tuple(PROMPTS[1]), params, 5), n, shift)


@pytest.mark.parametrize("method", [*METHODS][1:])
def test_greedy_texts_are_those_of_plain_decoding(method):
    """float32: 30 prompts of 1 to 30 tokens, as one ragged batch, and one by one."""
    llama = tiny(30, dtype=torch.float32, context=256, stop=(7,))
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(30, (1 + i,), generator=generator).tolist() for i in range(30)]
    expected = generate(llama, prompts, "autoregressive", max_new_tokens=40)["tokens"]
    assert len({len(text) for text in expected}) > 3  # some stop early
    for parts in ((), ("memory", "head")):
        words = options(method, llama, parts=parts)
        assert generate(llama, prompts, method, max_new_tokens=40, **words)["tokens"] == expected
        sampler = Sampler(llama, method, Params(0), 1, 100, **words)
        alone = [sampler.generate([prompt], 40)["tokens"][0] for prompt in prompts[::3]]
        assert alone == expected[::3]
