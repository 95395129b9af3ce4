"""Every sampler's exact distribution over two to four tokens, enumerated (tests/exact.py), is that of an independent, naive
implementation (tests/naive.py). No statistics: what differs by 1e-6 fails."""
import itertools

import pytest
import torch

import naive
from common import CODE, random_lookahead, tiny
from exact import check_exact, check_later_drafts

SETTINGS = [(0.0,), (1.0,), (0.5,), (1.0, 2), (1.0, 0, 0.7), (0.7, 2, 0.8), (1.5, 2)]  # temperature, top-k, top-p
BOTH = ("memory", "head")


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_autoregressive(settings):
    check_exact(CODE, "autoregressive", settings, n=3)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("parts", [(), ("memory",), ("head",), BOTH], ids=str)
def test_pass(settings, parts):
    check_exact(CODE, "pass", settings, parts=parts)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("tree", ["0", "0 00", "0 1", "0 1 00"])
def test_fused(settings, tree):
    check_exact(CODE, "fused", settings, parts=BOTH, tree=tree, drafts="1" not in tree)


@pytest.mark.parametrize("method, more", [("pass", {}), ("fused", dict(tree="0 00")), ("fused", dict(tree="0 1 00 10", drafts=False))],
                         ids=str)
def test_three_tokens(method, more):
    """The third token reaches past the second drafting pass, where whatever a step leaves behind in the cache does its damage."""
    check_exact(CODE, method, (1.0, 2), n=3, parts=BOTH, **more)
    check_exact(CODE, method, (1.0, 2), n=3, parts=BOTH, stop=(1,), **more)


@pytest.mark.parametrize("method, more", [("pass", {}), ("fused", dict(tree="0 1 00")), ("draft-model", dict(length=2))], ids=str)
def test_the_end_of_the_budget(method, more):
    """The last steps draft less, or nothing."""
    for room in (0, 1):
        more |= dict(draft_model=tiny(3, seed=9)) if method == "draft-model" else dict(parts=BOTH)
        check_exact(CODE, method, (1.0, 2), n=3, room=room, drafts=False, **more)


def test_later_drafts():
    check_later_drafts(CODE)


@pytest.mark.parametrize("temperature", [0.4, 0.0])
def test_drafts_of_another_temperature(temperature):
    check_exact(CODE, "fused", tree="0 1 00", parts=BOTH, drafts=False, draft_temperature=temperature)
    check_exact(CODE, "draft-model", draft_model=tiny(3, seed=9), length=2, draft_temperature=temperature)


@pytest.mark.parametrize("length, n, settings", [(1, 3, (1.0,)), (2, 2, (0.7, 2, 0.8)), (2, 3, (1.0, 2))])
def test_draft_model(length, n, settings):
    check_exact(CODE, "draft-model", settings, n=n, draft_model=tiny(3, seed=9), length=length)


def check_model(code):
    """Logits against the naive model's: a ragged batch with a memory in the cache; blocks that are committed in part, in full,
    along a path, or not at all; and the q that drafts come from."""
    model = code.tiny(5, seed=2)
    lookahead = code.random_lookahead(model, 2)
    judge, cache, texts = naive.Model(model, lookahead), code.model.Cache(model, 2, 16, lookahead.memory), [[1, 2, 3, 4, 0], [4, 0]]

    def block(columns, **more):
        x = torch.tensor(columns)
        return model.logits(model(x, cache.length[:, None] + more.pop("offset", torch.arange(x.shape[1])), cache, **more))

    def agree(logits, text, row, kind="the logits"):
        worst = (logits - torch.tensor(judge.next_logits(text), dtype=torch.float64)).abs().max()
        assert worst < 1e-5, f"{kind} of row {row} after {text} are not LLaMA's, by up to {worst:.1e}"

    logits = block([texts[0], texts[1] + [3, 3, 3]])
    for row, text in enumerate(texts):
        for i in range(len(text)):
            agree(logits[row, i], text[:i + 1], row)
    cache.commit(torch.tensor([5, 2]))
    block([[2, 2, 2], [1, 1, 1]])  # as if it had never run
    above = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]]).bool()
    logits = block([[3, 1, 2, 4], [0, 2, 1, 1]], visible=above, offset=torch.tensor([0, 1, 1, 2]))  # root, two children, a grandchild
    for row, (root, _, child, grandchild) in enumerate([[3, 1, 2, 4], [0, 2, 1, 1]]):
        agree(logits[row, 3], texts[row] + [root, child, grandchild], row, "in a tree, the logits")
    cache.commit(torch.tensor([3, 2]), torch.tensor([[0, 2, 3], [0, 1, 0]]))
    for row, text in enumerate([[1, 2, 3, 4, 0, 3, 2, 4, 1], [4, 0, 0, 2, 1]]):
        agree(block([[1], [1]])[row, 0], text, row, "after a path was committed, the logits")
    assert cache.length.tolist() == [8, 4]
    with torch.inference_mode():
        for prompt in ([1, 2, 3], [4]):  # the first drafts' q, of a row that is shorter than its neighbour
            run = code.pass_sampler.Run(model, [[0] * 6, prompt], code.pass_sampler.Params(1), lookahead, 9, length=2)
            h = code.pass_sampler.prefill(run, 2)
            for where, h in (("prefill", h), ("a step", step_again(run))):
                x = torch.tensor([0, 3])
                drafts, q = code.pass_sampler.draft(run, h[:, 1:], model.logits(h[:, 1:]), x)
                for j in range(2):
                    expected = naive.probs(judge.draft_logits(prompt, [3, *drafts[1].tolist()][:1 + j]))
                    worst = (q[1, j] - torch.tensor(expected, dtype=torch.float64)).abs().max()
                    assert worst < 1e-5, f"q of d_{j + 1} after {prompt}, from {where}, is not the look-ahead's, by {worst:.1e}"


def step_again(run):
    """Take back the last token of each row and run it once more as a step does, with its look-ahead."""
    run.cache.length = run.cache.length - 1
    h = run.forward(torch.tensor([prompt[-1:] for prompt in run.prompts]), 2)
    run.commit(1)
    return h


def test_model():
    check_model(CODE)


def check_stops(code):
    """Greedy texts end at the stop token, wherever in a run it comes, else at the budget, else at the end of the context."""
    prompt = [1, 2, 0]
    judge, text = naive.Model(code.tiny(6, seed=4)), []
    while len(text) < 9:
        text.append(naive.probs(judge.next_logits(prompt + text), 0).index(1))
    for method, L in [("autoregressive", 0), *itertools.product(("pass", "fused", "draft-model"), (1, 2, 6))]:
        def ends(n, context=64, stop=()):
            model = code.tiny(6, seed=4, context=context, stop=stop)
            own = dict(draft_model=model, length=L) if method == "draft-model" else dict(tree=f"chain:{L}")  # own drafts: all right
            lookahead = code.random_lookahead(model, L) if method in code.pass_sampler.LOOKS_AHEAD else None
            result = code.pass_sampler.generate(model, [prompt], method, lookahead, code.pass_sampler.Params(0), n, **own)
            return result["tokens"][0], result["stop_reason"][0]
        for n in range(1, 9):
            got = ends(n)
            assert got == (text[:n], "length"), f"{method}: {n} tokens were asked for, and got {got}, not {text[:n]}"
            end = text.index(text[n - 1]) + 1
            for budget in (end, end + 1, 9):  # a stop token that is also the last of the budget is a stop
                got = ends(budget, stop=(text[n - 1],))
                assert got == (text[:end], "stop"), f"{method}: {text[n - 1]} should stop {text[:budget]}, but the text is {got}"
        for room in (1, 6):
            for n in (room + 1, 20):
                assert ends(n, context=len(prompt) + room) == (text[:room], "context"), f"{method}: it does not end with the context"
        assert ends(6, context=len(prompt) + 6) == (text[:6], "length"), f"{method}: all that was asked for fits the context"


def test_stops():
    check_stops(CODE)


def test_random_lookaheads_are_of_use():
    """The checks above would be idle if the drafts were never, or always, accepted."""
    model = tiny(3, seed=3)
    judge = naive.Model(model, random_lookahead(model, 2))
    p, q = ([naive.probs(z) for z in logits] for logits in ([judge.next_logits([2, 0, 1, x]) for x in range(3)],
                                                            [judge.draft_logits([2, 0, 1], [x]) for x in range(3)]))
    shares = [sum(map(min, *pair)) for pair in zip(p, q)]
    assert sum(0.1 < share < 0.9 for share in shares) >= 2, shares
