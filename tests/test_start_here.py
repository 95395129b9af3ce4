"""Start here: the claim of this repository, tested twice, and how to break it. Two minutes to read.

The claim: whatever the drafts are worth, PaSS writes texts that follow the model's own
distribution.

(a) tests the rule by itself: 200,000 drafts from a q are judged against a p, and what comes out
    must be distributed as p.
(b) tests the whole loop on the model that ships, with one draft per step: of each token that PaSS
    writes, the model itself says how far down its distribution the token stands; these places must
    be uniform.

Both run twice: on the code as it is, and with a bug, for which they must fail. The bug: after a
rejection the token is drawn from p, and not from the residual max(0, p - q). You can plant it
yourself: in `residual` of pass_sampler.py let `rest = p`, then

    .venv/bin/python -m pytest tests/test_start_here.py

and both say that the output no longer follows p. A statistical test cannot see a very small bias.
tests/test_equivalence.py can: it enumerates all that a step may do, with several drafts too,
against tests/naive.py, which is the page to read next. That the model is a
LLaMA at all is shown by `test_equals_transformers` in tests/test_model.py: on it all else stands.
"""
import math

import pytest
import torch
from common import ALPHA, ROOT

import pass_sampler
from model import Llama
from pass_sampler import Params, Sampler, draw, load_lookahead, verify

# ------------------------------------------------ (a) the rule

P = torch.tensor([0.40, 0.30, 0.15, 0.10, 0.05])
Q = torch.tensor([0.10, 0.20, 0.30, 0.15, 0.25])
DRAWS = 200_000


def p_value_of_the_rule():
    """Null hypothesis: the first token that the rule lets out is distributed as P. Chi-square with
    4 degrees of freedom; 1e-6 is the significance.

    A draft is rejected with probability 0.4, so with the bug min(P, Q) + 0.4 P comes out. Its
    chi-square is 0.098 n, 19,700 for this n, where 35 would do: the power is 1."""
    u = torch.rand(DRAWS, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    p = P.expand(DRAWS, 2, 5)  # of the draft, and of the token after it
    q = Q.expand(DRAWS, 1, 5)
    drafts = draw(q, u[:, :1])
    accepted, last = verify(p, q, drafts, u[:, 1:])
    first = torch.where(accepted > 0, drafts[:, 0], last)
    seen = first.bincount(minlength=5).double()
    expected = DRAWS * P.double()
    print(f"of the rule: {(seen / DRAWS).tolist()}, p: {P.tolist()}")
    statistic = ((seen - expected) ** 2 / expected).sum()
    return torch.special.gammaincc(torch.tensor(2.0).double(), statistic / 2).item()


def test_the_rule():
    assert p_value_of_the_rule() > ALPHA, "what the rule lets out is not distributed as p"


def test_the_rule_would_show_the_bug(monkeypatch):
    monkeypatch.setattr(pass_sampler, "residual", lambda p, q: p)
    assert p_value_of_the_rule() < ALPHA


# ----------------------------------------- (b) the whole of PaSS

DEMO = ROOT / "demo" / "model"
ROWS, TOKENS = 192, 240  # texts side by side, and the length of each
BEGIN = 1  # the token <s>, which each text follows


def places(p, tokens, v):
    """U (n,): where tokens (n,) stand in their distributions p (n,V). v (n,) uniform.

    The vocabulary in order of falling p: U is the probability of all that stands above the token,
    plus v times the token's own; without v there would be only certain values. If each token is
    drawn from p, given the text before it, then all U are independent and uniform (Rosenblatt
    1952), whatever the drafts were.
    """
    own = p.gather(1, tokens[:, None])
    above = (p * (p > own)).sum(1)
    same = (p == own) & (torch.arange(p.shape[1]) < tokens[:, None])
    return above + (p * same).sum(1) + v * own[:, 0]


def write_and_place():
    """46,080 tokens that PaSS writes at temperature 1, as their places U. With one look-ahead token
    this takes half a minute, with four two."""
    model = Llama.load(DEMO, torch.float32)
    lookahead = load_lookahead(DEMO / "paper.safetensors", model, length=1)
    sampler = Sampler(
        model, "pass", Params(temperature=1), ROWS, 1 + TOKENS, lookahead=lookahead)
    result = sampler.generate([[BEGIN]] * ROWS, TOKENS, seed=0, stop_tokens=[])
    texts = torch.tensor(result["tokens"])  # (ROWS,TOKENS)
    read = Llama.load(DEMO, torch.float32)
    before = torch.cat([torch.full((ROWS, 1), BEGIN), texts[:, :-1]], 1)
    generator = torch.Generator().manual_seed(1)
    found = []
    for row, text in zip(before.split(8), texts.split(8)):
        h = read(row, pass_sampler.Cache(read, *row.shape))
        p = read.logits(h).softmax(-1).flatten(0, 1)
        v = torch.rand(len(p), dtype=torch.float64, generator=generator)
        found.append(places(p, text.flatten(), v))
    return torch.cat(found), result["accepted_at_least"][0]


def p_values_of_places():
    """Null hypothesis: the places are independent and uniform. Two p-values: of their mean, which
    is normal, and of their largest distance from uniform (Kolmogorov-Smirnov); 1e-6 is the
    significance of each.

    With the bug the mean is too large by 3.5 standard errors on 12,800 tokens, as another seed
    showed; that is 6.6 on 46,080, where 4.9 would do. So the power is .95."""
    u, accepted = write_and_place()
    n = len(u)
    z = (u.mean() - 0.5) * math.sqrt(12 * n)
    of_mean = math.erfc(abs(z) / math.sqrt(2))
    u = u.sort().values
    steps = torch.arange(n + 1) / n
    distance = math.sqrt(n) * max((steps[1:] - u).max(), (u - steps[:-1]).max())
    of_distance = 2 * sum((-1) ** (k - 1) * math.exp(-2 * (k * distance) ** 2) for k in range(1, 9))
    print(f"{n} tokens, first draft accepted in {accepted:.2f} of the steps: z {z:.2f}, distance "
          f"{distance:.2f}, p-values {of_mean:.1e} and {of_distance:.1e}")
    return of_mean, of_distance


@pytest.fixture
def two_threads():
    """This model is large enough for them."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@torch.inference_mode()
def test_pass_follows_the_model(two_threads):
    assert min(p_values_of_places()) > ALPHA, "the texts do not follow the model's distribution"


@torch.inference_mode()
def test_the_places_would_show_the_bug(monkeypatch, two_threads):
    monkeypatch.setattr(pass_sampler, "residual", lambda p, q: p)
    assert min(p_values_of_places()) < ALPHA
