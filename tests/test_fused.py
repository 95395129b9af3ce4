"""One pass a step: the rule for trees of drafts is exact, and whole texts follow the model whatever the tree."""
import itertools

import pytest
import torch

import pass_sampler
from common import ALPHA, CODE, check_power, ends, p_value, random_lookahead, tiny
from pass_sampler import Params, Tree, choose_tree, generate
from test_samplers import check_joint, look_ahead

# ------------------------------------------------------------------------------------------------------- the rule, enumerated

THIRDS = [torch.tensor(c, dtype=torch.float64) / 3 for c in itertools.product(range(4), repeat=3) if sum(c) == 3]


def first_token(verify_tree, p, q, candidates, twelfths, sixtieths):
    """Exact distribution (V,) of the first token where `candidates` siblings are drawn from q without replacement, in any order.

    p, q (V,) in thirds: then all that decides is at a multiple of 1/12 (accepting) or 1/60 (the last draw), see test_rule.py. An
    order that runs out of tokens with q > 0 goes on with others, at q = 0.
    """
    V, total = len(p), 0
    u = torch.cartesian_prod(sixtieths, *[twelfths] * candidates)
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
            node, last = verify_tree([0] * candidates, ps, torch.stack(qs).expand(n, -1, -1), tokens, u)
            first = torch.where(node > 0, tokens.gather(1, node[:, None])[:, 0], last)
            total += weight * first.bincount(minlength=V).double() / n
    return total


def check_rule_for_trees(code):
    for candidates, step in ((1, 1), (2, 1), (3, 3)):
        for p, q, grids in itertools.product(THIRDS[::step], THIRDS, zip(ends(12), ends(60))):
            got = first_token(code.pass_sampler.verify_tree, p, q, candidates, *grids)
            assert torch.allclose(got, p, atol=1e-12), (
                f"{candidates} candidates from q = {q.tolist()}: the output is distributed as {got.tolist()}, but "
                f"p = {p.tolist()}: the rule for trees is broken")


def test_rule_for_trees_is_exact():
    """All p and q in thirds over three tokens: ties, zeros, supports that do not overlap, fewer tokens than candidates."""
    check_rule_for_trees(CODE)


def test_chain_is_the_rule_of_the_paper():
    """verify_tree on a chain returns just what verify returns."""
    g = torch.Generator().manual_seed(0)
    p, q = (torch.rand(2000, n, 5, dtype=torch.float64, generator=g).softmax(-1) for n in (4, 3))
    drafts, u = torch.randint(5, (2000, 3), generator=g), torch.rand(2000, 4, dtype=torch.float64, generator=g)
    accepted, last = pass_sampler.verify(p, q, drafts, u)
    shift = lambda x: torch.nn.functional.pad(x, (0, 0) * (x.ndim - 2) + (1, 0))
    node, token = pass_sampler.verify_tree([0, 1, 2], p, shift(q), shift(drafts), u.roll(1, 1))
    assert (node == accepted).all() and (token == last).all() and len(set(node.tolist())) == 4


LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0], dtype=torch.float64)


def drafts_of_one_node(module, width, params, rows, seed=0):
    """Run draft_tree alone on LOGITS: the siblings (rows,width) and their q."""
    model = tiny(5, seed=1)
    run = module.Run(model, [[1]] * rows, params, look_ahead(model, 1), seed=seed, tree=Tree([str(k) for k in range(width)]))
    tokens, q = module.draft_tree(run, run.tree, torch.zeros(rows, 1, 16), LOGITS.expand(rows, 1, 5), torch.zeros(rows).long())
    return tokens[:, 1:], q[:, 1:]


def exact_siblings():
    """{ordered triple: probability} of three draws without replacement."""
    q, exact = pass_sampler.probs(LOGITS, Params(0.7)), {}
    for order in itertools.permutations(range(5), 3):
        a, b, c = q[list(order)].tolist()
        exact[order] = a * b / (1 - a) * c / (1 - a - b)
    return exact


def siblings_p_value(module, seed=0):
    """Null hypothesis: ordered triples of siblings are drawn without replacement from q, 20,000 of them. Their q is as stated."""
    siblings, q = drafts_of_one_node(module, 3, Params(0.7), 20_000, seed)
    expected = pass_sampler.probs(LOGITS, Params(0.7)).expand(20_000, 5)
    for k in range(3):
        torch.testing.assert_close(q[:, k], expected)
        expected = expected.scatter(1, siblings[:, k:k + 1], 0)
        expected = expected / expected.sum(1, keepdim=True)
    return p_value(siblings.tolist(), exact_siblings())


def check_siblings(code):
    assert siblings_p_value(code.pass_sampler) > ALPHA, "siblings are not drawn from q without replacement"


def test_siblings_are_drawn_from_the_q_that_they_come_with():
    check_siblings(CODE)
    check_power(exact_siblings(), 20_000, 0.04)


def test_siblings_where_q_has_no_more_tokens_and_where_it_is_greedy():
    _, q = drafts_of_one_node(pass_sampler, 3, Params(1, top_k=2), 10)
    assert (q[:, 1].count_nonzero(1) == 1).all() and (q[:, 2] == 0).all()
    siblings, q = drafts_of_one_node(pass_sampler, 2, Params(0), 1)
    assert siblings.tolist() == [[0, 1]]
    torch.testing.assert_close(q[0], torch.eye(5, dtype=torch.float64)[:2])
    q = torch.tensor([1 - 1e-300, 1e-300, 0], dtype=torch.float64)  # what is left is renormalised however little it is
    torch.testing.assert_close(pass_sampler.without_replacement(q, 2, torch.Generator())[1], torch.eye(3, dtype=torch.float64)[:2],
                               atol=1e-12, rtol=0)


# ---------------------------------------------------------------------------------------------------------------- whole texts

TREES = ["chain:3", "0 1", "0 1 2 00 01", "0 1 00 01 10 000 001"]


def test_trees_follow_the_model(monkeypatch):
    """Real random numbers, a large tree, memory and head; see tests/test_samplers.py. tests/test_exact.py has the small trees."""
    monkeypatch.setattr(pass_sampler, "SHORTLIST", 3)  # of 4 tokens
    check_joint(pass_sampler, "fused", Params(1), random_lookahead, tree=TREES[3], draft_temperature=0.5)


def test_groups_see_their_node_and_its_ancestors_only():
    """After a block with a tree, each group's states are those of a plain drafting pass after the text and the node's path."""
    check_groups(CODE)


def check_groups(code):
    module, model = code.pass_sampler, tiny(30)
    lookahead = random_lookahead(model, 2)
    run = module.Run(model, [[1, 2, 3]], Params(1), lookahead, 20, tree=module.Tree(["0", "1", "00"]))
    module.prefill(run)
    h = run.forward(torch.tensor([[4, 5, 6, 7]]), 2, run.tree)
    for node, path in enumerate([[4], [4, 5], [4, 6], [4, 5, 7]]):
        expected = module.prefill(module.Run(model, [[1, 2, 3, *path]], Params(1), lookahead, 20, length=2), 2)
        torch.testing.assert_close(torch.cat([h[:, node:node + 1], h[:, 4 + 2 * node:6 + 2 * node]], 1), expected)


@pytest.mark.parametrize("tree", TREES)
def test_greedy_fused_equals_greedy_autoregressive(tree):
    model, generator = tiny(30, dtype=torch.float32, context=256, stop=(7,)), torch.Generator().manual_seed(0)
    prompts = [torch.randint(30, (1 + i,), generator=generator).tolist() for i in range(12)]
    expected = generate(model, prompts, "autoregressive", params=Params(0), max_new_tokens=40)["tokens"]
    for make in (look_ahead, random_lookahead):
        assert generate(model, prompts, "fused", make(model, 3), Params(0), 40, tree=tree)["tokens"] == expected
        for prompt, text in zip(prompts[::5], expected[::5]):
            assert generate(model, [prompt], "fused", make(model, 3), Params(0), 40, tree=tree)["tokens"] == [text]


def test_perfect_drafts_give_the_whole_chain(monkeypatch):
    """One pass gives 1 + depth tokens where every draft is right."""
    model = tiny(30, dtype=torch.float32, context=256)
    text = generate(model, [[1]], "autoregressive", None, Params(0), 60)["tokens"][0]

    def oracle(run, tree, h, logits, x):
        tokens = torch.tensor([text[len(run.tokens[0]) - 1:][:1 + tree.depth]])
        return tokens, torch.nn.functional.one_hot(tokens, 30).float()
    monkeypatch.setattr(pass_sampler, "draft_tree", oracle)
    result = generate(model, [[1]], "fused", look_ahead(model, 3), Params(0), 57, tree="chain:3")
    assert result["tokens"][0] == text[:57] and result["passes"] == 1 + 14 and result["accepted_by_position"] == [1, 1, 1]


# ------------------------------------------------------------------------------------------------------------- choosing a tree

@pytest.mark.parametrize("tree", ["1", "0 0", "0 2", "00", "a b", "", "chain:x", "0 1 10 11 101", "chain:4", "chain:0", "²"])
def test_bad_trees(tree):
    model = tiny(30)
    with pytest.raises(pass_sampler.InputError, match="tree"):
        generate(model, [[1]], "fused", look_ahead(model, 3), Params(0), 4, tree=tree)


def test_choose_tree():
    """With free columns the best drafts are taken, with columns that cost as much as passes none."""
    by_rank = [[0.6, 0.8, 0.85], [0.5, 0.6, 0.62]]
    assert choose_tree(by_rank, {1: 1.0, 18: 1.0}, 0) == ["0", "00", "1", "10", "01"]
    assert choose_tree(by_rank, {1: 1.0, 18: 18.0}, 0) == choose_tree(by_rank, {1: 1.0, 18: 1.0}, 1.4) == []
    assert choose_tree(by_rank, {1: 1.0, 18: 1.0}, 0, judging=0.15) == ["0", "00"]  # worth .6 and .3; the next, "1", .2
    assert choose_tree([[0.01], [0.01]], {1: 1.0, 4: 1.1, 18: 1.5}, 0) == []
    assert choose_tree([[0.6]], {1: 1.0, 2: 1.5, 4: 1.5}, 0) == []  # 1.6 tokens for 1.5 of a pass of one column: less than MARGIN
    for tree in ([], ["0", "00", "1", "10", "01"]):
        Tree(tree)


def test_auto_without_a_tree_is_plain_decoding(monkeypatch):
    monkeypatch.setattr(pass_sampler, "step_seconds", lambda *_: ({1: 1.0, 32: 32.0}, 0.0))
    model = tiny(30)
    result = generate(model, [[1]], "fused", look_ahead(model, 3), Params(0), 9)
    assert result["tree"] == "" and result["passes"] == 9 and result["drafted"] == 0
    monkeypatch.setattr(pass_sampler, "step_seconds", lambda *_: ({1: 1.0, 32: 1.0}, 0.0))
    assert generate(model, [[1]], "fused", look_ahead(model, 3), Params(0), 9)["tree"].startswith("0")


def check_rollback(code):
    """With the model as its own draft model q is p at every position, whatever was rejected before: both caches hold the same text."""
    module, model, g, steps = code.pass_sampler, tiny(30), torch.Generator().manual_seed(0), []
    verify = module.verify

    def any_number(p, q, drafts, u):
        torch.testing.assert_close(q, p[:, :-1], msg="the draft model reads another text than the model")
        steps.append(drafts)
        accepted, last = verify(p, q, drafts, u)
        return torch.minimum(accepted, torch.randint(4, accepted.shape, generator=g)), last
    module.verify = any_number
    try:
        module.generate(model, [[1], [2, 3, 4]], "draft-model", None, module.Params(1), 40, draft_model=model, length=3)
    finally:
        module.verify = verify
    assert len(steps) > 10


def test_draft_model_rolls_back():
    check_rollback(CODE)


def test_draft_model_must_share_the_vocabulary():
    with pytest.raises(pass_sampler.InputError, match="vocabulary"):
        generate(tiny(30), [[1]], "draft-model", draft_model=tiny(29))
    with pytest.raises(pass_sampler.InputError, match="draft model"):
        generate(tiny(30), [[1]], "draft-model")
    with pytest.raises(pass_sampler.InputError, match="context of 8 tokens"):
        generate(tiny(30), [[1]], "draft-model", max_new_tokens=9, draft_model=tiny(30, context=8))
    with pytest.raises(pass_sampler.InputError, match="length of at least 1"):
        generate(tiny(30), [[1]], "draft-model", max_new_tokens=9, draft_model=tiny(30), length=0)
