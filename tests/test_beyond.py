"""What the paper does not have is held to the paper's claim: steps by enumeration against
tests/naive.py, rules by enumeration, whole texts by chi-square and greedy equality."""
import itertools

import pytest
import torch
from common import ALPHA, REAL, check_power, p_value, random_lookahead, tiny
from exact import check_exact
from test_equivalence import SETTINGS, check_joint, ends

from beyond.tree import best_tree, choose
from pass_sampler import METHODS, Params, generate, probs
from support.errors import InputError

BOTH = ("memory", "head")
BEYOND = [method for method in METHODS if method not in ("autoregressive", "pass")]
SOME = [(0.0,), (1.0,), (1.0, 2), (0.7, 2, 0.8)]


# ------------------------------------ steps, by enumeration

@pytest.mark.parametrize("method, parts, shape, settings, steps", [
    *[("pass", parts, 2, some, 1) for parts in (("memory",), ("head",), BOTH) for some in SOME],
    *[("fused", BOTH, 2, some, 1) for some in SOME],
    # From the second step on its drafts come from the group of the last accepted draft.
    ("fused", (), 1, (1.0,), 2), ("fused", BOTH, 2, (1.0, 2), 2),
    ("fused", BOTH, 1, (2.0, 2), 3),
    *[("tree", BOTH, tree, some, 1) for tree in ("0 00", "0 1", "0 1 00") for some in SETTINGS],
    ("tree", BOTH, "0 1", (1.0, 2), 2), ("tree", BOTH, "0 1", (0.0,), 3),
    ("tree", BOTH, "0 1 00 10 11", (2.0, 2), 1), ("tree", BOTH, "0 1 00 10", (0.0,), 3),
    ("draft-model", (), 2, (1.0,), 1), ("draft-model", (), 2, (1.0, 2), 2),
    ("draft-model", (), 1, (1.5,), 2)], ids=str)
def test_steps(method, parts, shape, settings, steps):
    check_exact(REAL, method, settings, parts, shape, steps)


# --------------------------------------- the rule for trees

THIRDS = [torch.tensor(c, dtype=torch.float64) / 3
          for c in itertools.product(range(4), repeat=3) if sum(c) == 3]


def first_token(code, p, q, candidates, twelfths, sixtieths):
    """Exact distribution (V,) of the first token, where `candidates` siblings were drawn from q
    without replacement. p, q (V,) in thirds: all that decides is at a multiple of 1/12 (to
    accept) or 1/60 (the last draw). An order that runs out of tokens with q > 0 goes on with
    others, at q = 0."""
    V, total = len(p), 0
    shape = code.tree.Shape(" ".join("012"[:candidates]), "cpu")
    u = torch.cartesian_prod(sixtieths, *[twelfths] * candidates).view(-1, 1 + candidates)
    for order in itertools.permutations(range(V), candidates):
        weight, left, qs = 1.0, q.clone(), [torch.zeros(V, dtype=q.dtype)]
        for k, token in enumerate(order):
            if left.sum() > 0:
                left = left / left.sum()
            weight *= left[token].item() if left.sum() > 0 else 1 / (V - k)
            qs.append(left.clone())
            left[token] = 0
        if weight:
            n = len(u)
            tokens = torch.tensor([[0, *order]]).expand(n, -1)
            ps = torch.stack([p] + [torch.full_like(p, 1 / V)] * candidates).expand(n, -1, -1)
            q_all = torch.stack(qs).expand(n, -1, -1)
            node, last = code.tree.verify_tree(shape, ps, q_all, tokens, u)
            first = torch.where(node > 0, tokens.gather(1, node[:, None])[:, 0], last)
            total += weight * first.bincount(minlength=V).double() / n
    return total


def test_rule_for_trees(code=REAL):
    for candidates, step in ((1, 1), (2, 1), (3, 5)):
        some, grid_pairs = THIRDS[::step], zip(ends(12), ends(60))
        for p, q, grids in itertools.product(some, some, grid_pairs):
            got = first_token(code, p, q, candidates, *grids)
            assert torch.allclose(got, p, atol=1e-12), (
                f"{candidates} candidates from q = {q.tolist()}: the output is distributed as "
                f"{got.tolist()}, but p = {p.tolist()}: the rule for trees is broken")


# ----------------------------------------------- candidates

LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0], dtype=torch.float64)


TRIPLES = 20_000


def siblings(code, seed):
    """Three candidates of one node from LOGITS, (TRIPLES,3), and their q."""
    llama, params = code.tiny(5, seed=1), code.pass_sampler.Params(0.7)
    shape = code.tree.Shape("0 1 2", "cpu")
    lookahead = code.random_lookahead(llama, 1, ()).ready(llama)
    s = code.pass_sampler.Sampler(llama, "autoregressive", params, TRIPLES, 20)
    group = code.fused.Group(s, code.fused.Layout([[0]], lookahead))
    group.logits.copy_(LOGITS)
    u = torch.rand(TRIPLES, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    tokens, q = code.tree.grow(shape, s, lookahead, group, u)
    return tokens[:, 1:], q[:, 1:]


def exact_siblings():
    """{ordered triple: probability} of three draws without replacement."""
    q, exact = probs(LOGITS, Params(0.7)), {}
    for order in itertools.permutations(range(5), 3):
        a, b, c = q[list(order)].tolist()
        exact[order] = a * b / (1 - a) * c / (1 - a - b)
    return exact


def siblings_p_value(code, seed=0):
    """Null hypothesis: 20,000 triples of siblings are draws without replacement from q. Their q is
    as stated. test_power_for_siblings has the power."""
    drawn, q = siblings(code, seed)
    expected = probs(LOGITS, Params(0.7)).expand(TRIPLES, 5)
    for k in range(3):
        torch.testing.assert_close(q[:, k], expected, msg="q is not what is left for this sibling")
        expected = expected.scatter(1, drawn[:, k:k + 1], 0)
        expected = expected / expected.sum(1, keepdim=True)
    return p_value(drawn.tolist(), exact_siblings())


def test_siblings(code=REAL):
    """They are drawn from the q that they come with."""
    assert siblings_p_value(code) > ALPHA, "siblings are not drawn from q without replacement"


def test_power_for_siblings():
    check_power(exact_siblings(), TRIPLES, 0.04)


# ---------------------------------------------- whole texts

@pytest.mark.parametrize("method", BEYOND)
def test_ragged_batches_follow_the_model(method):
    check_joint(REAL, method, Params(1), parts=BOTH, batches=10)


def test_a_shortlist_that_cuts_follows_the_model(monkeypatch):
    monkeypatch.setattr(REAL.lookahead, "SHORTLIST", 3)  # of 4 tokens
    check_joint(REAL, "pass", Params(1), parts=BOTH, batches=10)
    check_joint(REAL, "tree", Params(1), parts=BOTH, batches=10, tree="0 1 2")


def test_a_draft_model_that_is_the_model_is_always_right():
    """Then q is p at every position, whatever was rejected before: both caches hold one text."""
    llama = tiny(30, dtype=torch.float32, context=256)
    words = {"draft_model": llama, "length": 3}
    result = generate(llama, [[1], [2, 3, 4]], "draft-model", Params(0), 60, **words)
    assert result["accepted_at_least"] == [1, 1, 1] and result["passes"] == 15
    assert result["tokens_per_pass"] == 4


def test_groups(code=REAL):
    """A group's states are those of a plain drafting pass after the text and the path to its
    node."""
    llama = code.tiny(30)
    lookahead = code.random_lookahead(llama, 2).ready(llama)
    paths = [0], [0, 1], [0, 2], [0, 1, 3]  # the tree "0 1 00"
    layout = code.fused.Layout(paths, lookahead)

    def after(text):
        cache = lookahead.new_cache(llama, 1, 40)
        llama(torch.tensor([text]), cache)
        cache.commit(len(text))
        return cache

    cache = after([1, 2, 3])
    h = layout.run(llama, torch.tensor([[4, 5, 6, 7]]), cache)
    for node, path in enumerate([[4], [4, 5], [4, 6], [4, 5, 7]]):
        cache = after([1, 2, 3, *path[:-1]])
        expected = lookahead.forward(llama, torch.tensor([path[-1:]]), cache)
        group = torch.cat([h[:, node:node + 1], h[:, 4 + 2 * node:6 + 2 * node]], 1)
        assert torch.allclose(group, expected), (
            f"node {node} or its look-ahead sees something else than the path to it and the memory")


# -------------------------------------------------- options

@pytest.mark.parametrize("tree", [
    "1", "0 0", "0 2", "00", "a b", "", "0 1 10 11 101", "0 00 000 0000", "\u00b2", "0 1 2 3 4 5"])
def test_bad_trees(tree):
    llama = tiny(5)
    with pytest.raises(InputError, match="tree"):
        generate(llama, [[1]], "tree", tree=tree, lookahead=random_lookahead(llama, 3))


@pytest.mark.parametrize("vocab, context, length, says", [
    (29, 64, 4, "vocabulary"), (30, 8, 4, "context of 8"), (30, 64, 0, "length must be 1 to")])
def test_bad_draft_models(vocab, context, length, says):
    with pytest.raises(InputError, match=says):
        generate(tiny(30), [[1]], "draft-model", max_new_tokens=9, length=length,
                 draft_model=tiny(vocab, context=context))


def test_cover(code=REAL):
    """That one of two candidates is accepted, against the sum over all first ones: what is refused
    is x from max(0, q - p), and the second comes from q without x. Null hypothesis: the estimates
    of 20,000 rows have that mean. Within 5 standard errors of it at the fixed seed (6e-7 for a
    right one); bugs that matter are 20 and more away."""
    g = torch.Generator().manual_seed(0)
    logits, p = torch.randn(5, generator=g), torch.randn(5, generator=g).softmax(-1)
    q, both = logits.softmax(-1), 1.0
    rest = (p - q).clamp(min=0) / (p - q).clamp(min=0).sum()
    for x in range(5):
        q_x = logits.clone().index_fill_(0, torch.tensor(x), -torch.inf).softmax(-1)
        both -= (q - p)[x].clamp(min=0) * (1 - torch.minimum(rest, q_x).sum())
    rows = 20_000
    found = code.tree.cover(p.expand(rows, -1), logits.expand(rows, -1),
                            code.pass_sampler.Params(1), g, 2)
    assert torch.allclose(found[:, 0], torch.minimum(p, q).sum())
    off = (found[:, 1].double().mean() - both).abs() / found[:, 1].std() * rows ** 0.5
    assert off < 5, f"{off:.0f} standard errors: not the chance that one of two is accepted"


def test_best_tree():
    """The drafts that are worth most, as many as the columns hold."""
    by_rank = [[0.6, 0.8, 0.85], [0.5, 0.6, 0.62]]
    assert best_tree(by_rank, 2, 18)[0] == ["0", "00", "1", "10", "01"]
    paths, tokens = best_tree(by_rank, 1, 6)
    assert paths == ["0", "1"] and abs(tokens - 1.8) < 1e-12
    paths, _ = best_tree([[0.5, 0.5, 0.8]], 1, 64)
    assert paths == ["0", "1", "2"], "a rank that adds nothing hides the next"


@pytest.mark.parametrize("share, chosen", [(1.0, True), (0.001, False)])
def test_choose(share, chosen, capsys):
    """On a tiny model a tree pays if its drafts are always right, and not if they are never."""
    llama = tiny(30, dtype=torch.float32, context=256)
    lookahead = random_lookahead(llama, 3, ())
    lookahead.acceptance = {1.0: {"by_rank": [[share, share]] * 3}}
    assert bool(choose(llama, lookahead, 0.9)) == chosen
    assert "times as fast as plain decoding" in capsys.readouterr().err
