"""Whole texts follow the model: exactly where greedy, elsewhere by chi-square against the chain rule. tests/test_exact.py enumerates what
chance can do to one row; here real random numbers are at work, in batches, over more tokens. Stopping, seeds, statistics too."""
from dataclasses import astuple
from functools import lru_cache, partial

import pytest
import torch

import pass_sampler
from common import ALPHA, check_power, exact_texts, p_value, random_lookahead, tiny
from pass_sampler import METHODS, Lookahead, Params, generate

PROMPTS = [[1], [2, 3, 1], [0, 1, 2, 3, 3, 1, 2]]
N, BATCH = 12_000, 300  # texts a test, a third for each prompt; significance ALPHA. test_power says what deviation that finds.


def options(method, model, L=3):
    """What a method needs beyond a look-ahead: a tree L deep; a draft model unlike the model."""
    c = model.config
    other = lambda: tiny(c.vocab_size, seed=8, dtype=model.embedding.dtype, context=c.context, stop=c.stop_tokens)
    return {"fused": lambda: dict(tree="0 1 00 01 000" if L == 3 else f"chain:{L}"),
            "draft-model": lambda: dict(draft_model=other(), length=L)}.get(method, dict)()


look_ahead = partial(random_lookahead, parts=())  # embeddings only


# ------------------------------------------------------------------------------------------------------------------- greedy

@pytest.mark.parametrize("L", [1, 2, 4, 7])
def test_greedy_pass_equals_greedy_autoregressive(L):
    """float32, token by token: 30 prompts of 1 to 30 tokens, one at a time, then as one ragged batch."""
    model, generator = tiny(30, dtype=torch.float32, context=256, stop=(7,)), torch.Generator().manual_seed(L)
    prompts = [torch.randint(30, (1 + i,), generator=generator).tolist() for i in range(30)]
    settings = dict(params=Params(0), max_new_tokens=40)
    expected = [generate(model, [p], "autoregressive", **settings)["tokens"][0] for p in prompts]
    assert len({len(text) for text in expected}) > 3  # some stop early
    for lookahead in (look_ahead(model, L), Lookahead(model.embedding[:L])):
        single = [generate(model, [p], "pass", lookahead, **settings)["tokens"][0] for p in prompts]
        batch = generate(model, prompts, "pass", lookahead, **settings)["tokens"]
        assert single == expected and batch == expected
    assert generate(model, prompts, "autoregressive", **settings)["tokens"] == expected


def test_long_prompts_are_prefilled_in_blocks(monkeypatch):
    """Temperature 1 in float64, so that the texts depend on the first drafts too, which nothing but prefill makes."""
    model, prompts = tiny(30, context=256), [list(range(20)) * 4, [1], list(range(9))]
    texts = lambda: generate(model, prompts, "pass", random_lookahead(model, 3), Params(1), 20)["tokens"]
    whole = texts()
    monkeypatch.setattr(pass_sampler, "PREFILL_BLOCK", 8)
    assert texts() == whole


def test_rows_that_accept_everything_beside_rows_that_accept_nothing(monkeypatch):
    """Two passes give L+2 tokens where every draft is right, 2 where none is: here row 0's drafts come from its own future and
    row 1's never from it. Row 0 ends long before row 1, in the middle of an accepted run, and must not disturb it."""
    model = tiny(30, dtype=torch.float32, context=256)
    texts = generate(model, [[1], [2]], "autoregressive", None, Params(0), 80)["tokens"]

    def oracle(run, h, logits, x):
        drafts = torch.zeros(len(run.tokens), h.shape[1], dtype=torch.long)
        for row, tokens in enumerate(run.tokens):
            future = torch.tensor(texts[row][len(tokens):len(tokens) + h.shape[1]])
            drafts[row, :len(future)] = future if row == 0 else (future + 1) % 30
        return drafts, torch.nn.functional.one_hot(drafts, 30).float()
    monkeypatch.setattr(pass_sampler, "draft", oracle)
    both = generate(model, [[1], [2]], "pass", look_ahead(model, 4), Params(0), 58)
    assert both["tokens"] == [text[:58] for text in texts]
    alone = generate(model, [[1]], "pass", look_ahead(model, 4), Params(0), 60)
    assert alone["tokens"][0] == texts[0][:60] and alone["passes"] == 20 and alone["tokens_per_pass"] == 3
    assert alone["accepted_by_position"] == [1, 1, 1, 1] and alone["drafted"] == 40


# ------------------------------------------------------------------------------------------------------ joint distributions

SETTINGS, SINGLE = [Params(1), Params(0.7, 3, 0.8)], 1500


@lru_cache
def expected(prompt, *params):
    return exact_texts(tiny(4, seed=3, stop=(0,)), list(prompt), Params(*params), 5)


def joint_p_values(module, method, params, make=look_ahead, seed=0, n=N, **more):
    """p-values, one a prompt. Null hypothesis: the texts of 5 tokens, fewer where 0 stops them, are independent draws from the model.

    The batch holds many rows of each prompt, so that rows of different lengths accept different numbers of drafts. Five tokens
    reach two tokens past the second drafting pass, where whatever a step leaves behind in the cache does its damage.
    """
    model, params = tiny(4, seed=3, stop=(0,)), module.Params(*astuple(params))
    lookahead = make(model, 3)
    texts, more = [], options(method, model) | more
    for batch in range(n // BATCH):
        texts += module.generate(model, PROMPTS * (BATCH // len(PROMPTS)), method, lookahead, params, 8, seed + batch, **more)["tokens"]
    texts = [text[:5] for text in texts]  # of 8, so that no draft is left out for want of budget
    return [p_value(texts[i::len(PROMPTS)], expected(tuple(prompt), *astuple(params)))
            for i, prompt in enumerate(PROMPTS)]


def check_joint(module, method, params, make=look_ahead, **more):
    for prompt, p in zip(PROMPTS, joint_p_values(module, method, params, make, **more)):
        assert p > ALPHA, f"{method}, {params}: texts after {prompt} do not follow the model (p-value {p:.1e})"


@pytest.mark.parametrize("params", SETTINGS, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_ragged_batch_follows_the_model(method, params):
    check_joint(pass_sampler, method, params)


def test_memory_and_head_follow_the_model(monkeypatch):
    monkeypatch.setattr(pass_sampler, "SHORTLIST", 3)  # of 4 tokens
    check_joint(pass_sampler, "pass", Params(1), random_lookahead)


def single_p_value(module, method, first=0):
    """Batch of one: 1,500 runs, each with a seed of its own. Null hypothesis: their texts of 3 tokens are draws from the model."""
    model, params = tiny(4, seed=3, stop=(0,)), module.Params(0.8, 3)
    more = options(method, model)
    texts = [module.generate(model, [[2, 3, 1]], method, look_ahead(model, 3), params, 5, seed, **more)["tokens"][0][:3]
             for seed in range(first, first + SINGLE)]
    return p_value(texts, exact_texts(model, [2, 3, 1], params, 3))


@pytest.mark.parametrize("method", METHODS)
def test_single_rows_follow_the_model(method):
    assert single_p_value(pass_sampler, method) > ALPHA


@pytest.mark.parametrize("n, length, params, shift", [(N // 3, 5, Params(1), 0.1), (N // 3, 5, Params(0.7, 3, 0.8), 0.08),
                                                      (SINGLE, 3, Params(0.8, 3), 0.12)], ids=str)
def test_power(n, length, params, shift):
    """The smallest deviation, in total variation, that these tests find with a power of 99 %."""
    check_power(exact_texts(tiny(4, seed=3, stop=(0,)), PROMPTS[1], params, length), n, shift)


# ------------------------------------------------------------------------------------------------------------ seeds, statistics

@pytest.mark.parametrize("method", METHODS)
def test_seeds(method):
    model = tiny(30)
    def texts(seed, rows=1):
        return generate(model, [[1, 2]] * rows, method, look_ahead(model, 3), Params(1), 12, seed, **options(method, model))["tokens"]
    assert texts(1, 3) == texts(1, 3) != texts(2, 3)
    assert len({tuple(row) for row in texts(1, 8)}) == 8


def test_memory_leaves_autoregressive_alone():
    """Not a bit of the texts depends on a memory in the cache, nor on anything else of the look-ahead."""
    model = tiny(30, dtype=torch.float32)
    for prompts in ([[1, 2]], [[1, 2], [3], [4, 5, 6]]):
        plain, beside = (generate(model, prompts, "autoregressive", look, Params(1), 20)["tokens"]
                         for look in (None, random_lookahead(model, 3)))
        assert plain == beside


def test_streamed_tokens_are_the_result():
    model, seen = tiny(30), [[], []]
    result = generate(model, [[1], [2, 3, 4]], "pass", look_ahead(model, 3), Params(1), 20,
                      on_token=lambda row, token, from_draft: seen[row].append((token, from_draft)))
    assert seen == [list(zip(t, f)) for t, f in zip(result["tokens"], result["from_draft"])]
    share, drafted = result["accepted_by_position"], result["drafted"]
    assert drafted >= 3 and sorted(share, reverse=True) == share and any(map(any, result["from_draft"]))
