"""The loop that all methods share: where texts end, seeds, many prompts, statistics; and that a
step is what a GPU can record: of fixed shapes, in place, without waiting for the device."""
import gc
import itertools
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import naive
from common import REAL, random_lookahead, tiny
from files import InputError
from pass_sampler import METHODS, Lookahead, Params, Sampler, generate
from test_equivalence import options


def run(code, llama, method, prompts, n, params=None, L=3, **more):
    words = options(method, llama, L)
    params = params or code.pass_sampler.Params(0)
    return code.pass_sampler.generate(llama, prompts, method, params, n, **words, **more)


# ------------------------------------------ where texts end

def check_stops(code):
    """Greedy texts end at the stop token, wherever in a run it comes, else at the budget, else at
    the end of the context."""
    prompt, text = [1, 2, 0], []
    judge = naive.Model(tiny(6, seed=4))
    while len(text) < 9:
        text.append(naive.probs(judge.next_logits(prompt + text), 0).index(1))
    cases = [("autoregressive", 1), *itertools.product(("pass", "fused", "draft-model"), (1, 6))]
    for method, L in cases:
        def ends(n, context=64, stop=()):
            llama = code.tiny(6, seed=4, context=context, stop=stop)
            words = {"lookahead": code.random_lookahead(llama, L)}
            if method == "draft-model":  # its own drafts: all of them are right
                words = {"draft_model": llama, "length": L}
            params = code.pass_sampler.Params(0)
            result = code.pass_sampler.generate(
                llama, [prompt], method, params, n, **words if method != "autoregressive" else {})
            return result["tokens"][0], result["stop_reason"][0]

        for n in range(1, 9):
            got = ends(n)
            assert got == (text[:n], "length"), f"{method}: {n} tokens were asked for, not {got}"
            end = text.index(text[n - 1]) + 1
            for budget in (end, end + 1, 9):  # a stop at the end of the budget is a stop
                got = ends(budget, stop=(text[n - 1],))
                assert got == (text[:end], "stop"), (
                    f"{method}: {text[n - 1]} should stop {text[:budget]}, but the text is {got}")
        for room in (1, 6):
            for n in (room + 1, 20):
                got = ends(n, context=len(prompt) + room)
                assert got == (text[:room], "context"), f"{method}: the context ends, not {got}"
        assert ends(6, context=len(prompt) + 6) == (text[:6], "length"), f"{method}: it fits"


def test_stops():
    check_stops(REAL)


def check_ended_rows(code):
    """A row that has ended commits nothing, whatever the others do."""
    llama = code.tiny(30, context=400)
    for method in METHODS:
        words = options(method, llama)
        s = code.pass_sampler.Sampler(llama, method, code.pass_sampler.Params(1), 2, 60, **words)
        s.generate([[1], [2]], 4)
        s.alive.copy_(torch.tensor([0, 1]))
        with torch.inference_mode():
            before = [cache.length.clone() for _, cache in s.caches]
            s.next_step()
        for (_, cache), length in zip(s.caches, before):
            assert cache.length[0] == length[0], f"{method}: a row that has ended commits tokens"
            assert cache.length[1] > length[1], f"{method}: a row that goes on commits nothing"


def test_rows_that_have_ended_commit_nothing():
    check_ended_rows(REAL)


def test_rows_that_accept_everything_beside_rows_that_accept_nothing():
    """Two passes give L+2 tokens where every draft is right, 2 where none is. Row 0 ends long
    before row 1, in the middle of an accepted run, and must not disturb it."""
    llama = tiny(30, dtype=torch.float32, context=256)
    texts = generate(llama, [[1], [2]], "autoregressive", max_new_tokens=90)["tokens"]
    futures = torch.tensor([[1, *texts[0]], [2, *texts[1]]])

    class Oracle(Lookahead):
        def ready(self, model):
            return self

        def draft(self, model, params, h, logits, x, u):
            cache = sampler.caches[0][1]
            place = cache.length[:, None] + 1 + torch.arange(h.shape[1])
            drafts = futures[:len(x)].gather(1, place.clamp(max=90))
            drafts[1:] = (drafts[1:] + 1) % 30
            return drafts, torch.nn.functional.one_hot(drafts, 30).float()

    oracle = Oracle(llama.embedding[:4])
    sampler = Sampler(llama, "pass", Params(0), 2, 100, lookahead=oracle)
    assert sampler.generate([[1], [2]], 58)["tokens"] == [text[:58] for text in texts]
    sampler = Sampler(llama, "pass", Params(0), 1, 100, lookahead=oracle)
    alone = sampler.generate([[1]], 60)
    assert alone["tokens"][0] == texts[0][:60] and alone["passes"] == 20
    assert alone["accepted_at_least"] == [1, 1, 1, 1]
    assert alone["tokens_per_pass"] == 3


# ----------------------------- seeds, many prompts, figures

@pytest.mark.parametrize("method", METHODS)
def test_seeds_and_many_prompts(method):
    """The same seed gives the same text, from a Sampler that has served other prompts too."""
    llama = tiny(30)
    sampler = Sampler(llama, method, Params(1), 8, 40, **options(method, llama))
    once = sampler.generate([[1, 2]] * 8, 12, 1)["tokens"]
    assert len({tuple(row) for row in once}) == 8
    assert sampler.generate([[1, 2]] * 8, 12, 2)["tokens"] != once
    sampler.generate([[5, 6, 7, 8, 9, 10], [3]], 30, 3)
    assert sampler.generate([[1, 2]] * 8, 12, 1)["tokens"] == once
    words = options(method, llama)
    assert generate(llama, [[1, 2]] * 8, method, Params(1), 12, 1, **words)["tokens"] == once
    assert len(sampler.generate([[1, 2]], 12, 1)["tokens"]) == 1


def test_long_prompts_are_prefilled_in_blocks(monkeypatch):
    llama, prompts = tiny(30, context=256), [list(range(20)) * 4, [1], list(range(9))]
    texts = lambda: run(REAL, llama, "pass", prompts, 20, Params(1))["tokens"]
    whole = texts()
    monkeypatch.setattr(REAL.pass_sampler, "PREFILL", 8)
    assert texts() == whole


def test_streamed_tokens_are_the_result():
    llama, seen = tiny(30), [[], []]
    note = lambda row, token, from_draft: seen[row].append((token, from_draft))
    result = run(REAL, llama, "pass", [[1], [2, 3, 4]], 20, Params(1), on_token=note)
    assert seen == [list(zip(*row)) for row in zip(result["tokens"], result["from_draft"])]
    share = result["accepted_at_least"]
    assert len(share) == 3 and sorted(share, reverse=True) == share
    assert any(map(any, result["from_draft"]))


def check_memory(code):
    """Not a bit of plain decoding depends on what a look-ahead adds; nor do ordinary columns
    beside a memory in the cache."""
    llama = code.tiny(50)
    memory = code.random_lookahead(llama, 1).memory
    plain = code.model.Cache(llama, 2, 9)
    beside = code.model.Cache(llama, 2, 9).with_memory(memory)
    for T in (4, 1):
        x = torch.arange(T).expand(2, T)
        a, b = llama(x, plain), llama(x, beside)
        assert (a - b).abs().max() < 1e-12, "the text sees the memory: the model is not untouched"
        plain.commit(T), beside.commit(T)
    reads = beside.mask(2, sees_memory=torch.tensor([False, True]))
    h, with_memory = llama(x.repeat(1, 2), plain), llama(x.repeat(1, 2), beside, mask=reads)
    off = (h - with_memory).abs().amax((0, 2))
    assert off[0] < 1e-12 and off[1] > 1e-2, "the memory is not seen by those that ask for it"


def test_memory_is_seen_by_its_readers_only():
    check_memory(REAL)


# ------------------------------------ what a GPU can record

WAITING = {torch.ops.aten.nonzero.default, torch.ops.aten.masked_select.default,
           torch.ops.aten._local_scalar_dense.default}
WAITS = ["item", "tolist", "__int__", "__bool__", "__float__", "nonzero", "cpu", "numpy"]


class Waits(Exception):
    """A step asked for a value that the device has not computed yet."""


class Watch(TorchDispatchMode):
    """Raises Waits where an operation waits for the device, and notes the shapes of all results."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        indices = args[1] if "index" in str(function) and len(args) > 1 else ()
        masks = [i for i in indices if torch.is_tensor(i) and i.dtype == torch.bool] if isinstance(
            indices, (list, tuple)) else []
        if function in WAITING or masks:
            raise Waits
        result = function(*args, **kwargs or {})
        self.shapes.append((str(function), getattr(result, "shape", None)))
        return result


def check_recordable(code):
    """A step never waits for the device, and leaves what outlives it where it was. (On a GPU the
    cache reads all its slots, so that shapes are fixed; here it is told to.)"""
    for method in METHODS:
        llama = code.tiny(30)
        words = options(method, llama, parts=("memory", "head"))
        params = code.pass_sampler.Params(0.9, 5, 0.9)
        s = code.pass_sampler.Sampler(llama, method, params, 2, 40, **words)
        expected = s.generate([[1, 2], [3]], 12)["tokens"]
        for _, cache in s.caches:
            cache.reads_all = True

        def kept():
            buffers = [s.x, s.alive, s.finite, s.u, *s.buffers]
            for _, cache in s.caches:
                buffers += [cache.kv, cache.length]
            return [(id(buffer), buffer.data_ptr()) for buffer in buffers]

        before, real = kept(), {name: getattr(torch.Tensor, name) for name in WAITS}

        def wait(*_):
            raise Waits

        advance, shapes = s.advance, []

        def watched():
            for name in WAITS:
                setattr(torch.Tensor, name, wait)
            try:
                with Watch() as watch:
                    result = advance()
                shapes.append(watch.shapes)
                return result
            except Waits:
                raise AssertionError(f"{method}: a step waits for the device") from None
            finally:
                for name, function in real.items():
                    setattr(torch.Tensor, name, function)

        s.advance = watched
        got = s.generate([[1, 2], [3]], 12)["tokens"]
        assert got == expected, f"{method}: a slot shows that is not seen"
        assert all(step == shapes[0] for step in shapes), f"{method}: the shapes of a step change"
        assert kept() == before and all(buffer.any() for buffer in s.buffers), (
            f"{method}: a step rebinds a buffer, which a graph would not see")


def test_steps_can_be_recorded():
    check_recordable(REAL)


# ------------------------------------------ what is refused

@pytest.mark.parametrize("method, more, says", [
    ("magic", {}, "there is no method 'magic', only autoregressive, pass, fused"),
    ("parallel", {}, "there is no method 'parallel'"),
    ("autoregressive", {"lookahead": 1}, "lookahead has no effect on method autoregressive"),
    ("pass", {"lookahead": 1, "tree": "0"}, "tree has no effect on method pass, which has: look"),
    ("pass", {}, "pass needs a lookahead"),
    ("fused", {"lookahead": None}, "fused needs a lookahead"),
    ("draft-model", {}, "needs a draft_model")])
def test_options_that_a_method_has_not(method, more, says):
    with pytest.raises(InputError, match=says):
        generate(tiny(30), [[1]], method, **more)


@pytest.mark.parametrize("prompts, more, says", [
    ([], {}, "at least one prompt"), ([[1]], {"max_new_tokens": 0}, "one new token"),
    ([1, 2], {}, "list of lists"), ([[]], {}, "prompt is empty"), ([[1] * 64], {}, "shorten the"),
    ([[1, 30]], {}, "tokens from 1 to 30"), ([[-1]], {}, "tokens from -1")])
def test_prompts_that_cannot_be_continued(prompts, more, says):
    with pytest.raises(InputError, match=says):
        generate(tiny(30), prompts, "autoregressive", **more)


def test_a_sampler_recovers_from_logits_that_are_not_finite():
    """What a prompt has spoilt in the cache does not reach the next one."""
    llama = tiny(30, dtype=torch.float32)
    sampler = Sampler(llama, "autoregressive", Params(0), 2, 40)
    expected = sampler.generate([[1, 2], [3]], 9)["tokens"]
    embedding = llama.embedding[4].clone()
    llama.embedding[4] = float("inf")
    with pytest.raises(InputError, match="not finite"):
        sampler.generate([[4] * 20, [4] * 20], 9)
    llama.embedding[4] = embedding
    sampler.caches[0][1].reads_all = True
    assert sampler.generate([[1, 2], [3]], 9)["tokens"] == expected


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("method", METHODS)
def test_logits_that_are_not_finite_are_reported(method, temperature):
    """Weights that are finite can still overflow."""
    for weight in (float("nan"), 3e38):
        llama = tiny(30, dtype=torch.float32)
        llama.norm.fill_(weight)
        llama.output.mul_(1e3)
        with pytest.raises(InputError, match="not finite"):
            run(REAL, llama, method, [[1, 2]], 9, Params(temperature))


def test_a_lookahead_that_overflows():
    """A head makes a q that is not finite: the drafts are rejected, and the text is the model's."""
    llama = tiny(30, dtype=torch.float32)
    plain = generate(llama, [[1, 2]], "autoregressive", max_new_tokens=9)["tokens"]
    for method in ("pass", "fused", "tree"):
        lookahead = random_lookahead(llama, 2, ("head",))
        lookahead.head_out.fill_(3e38)
        greedy = generate(llama, [[1, 2]], method, max_new_tokens=9, lookahead=lookahead)
        assert greedy["tokens"] == plain
        sampled = generate(llama, [[1, 2]], method, Params(1), 9, lookahead=lookahead)
        assert len(sampled["tokens"][0]) == 9
        lookahead.embeddings.fill_(3e38)
        greedy = generate(llama, [[1, 2]], method, max_new_tokens=9, lookahead=lookahead)
        assert greedy["tokens"] == plain


def test_nothing_changes_its_arguments():
    """A look-ahead that has been used is as it was; a model that nobody holds is freed."""
    import gc
    import weakref
    llama = tiny(30, dtype=torch.float32)
    lookahead = random_lookahead(llama, 2)
    before = {name: part for name, part in vars(lookahead).items()}
    for method in ("pass", "fused", "tree"):
        generate(llama, [[1, 2]], method, max_new_tokens=9, lookahead=lookahead)
    assert all(vars(lookahead)[name] is part for name, part in before.items())
    gone = weakref.ref(llama)
    del llama
    gc.collect()
    assert gone() is None


def check_freed(code, methods=METHODS):
    """A sampler is freed when nobody holds it, by counting references: the garbage collector comes
    late, and caches are large."""
    module, model = code.pass_sampler, code.tiny(6)
    gc.disable()
    try:
        for method in methods:
            s = module.Sampler(model, method, module.Params(1), 1, 20, **options(method, model))
            s.generate([[1, 2]], 4)
            freed = weakref.ref(s)
            del s
            assert freed() is None, f"a sampler of {method} is kept by itself"
    finally:
        gc.enable()


@pytest.mark.parametrize("method", METHODS)
def test_samplers_are_freed(method):
    check_freed(REAL, [method])
