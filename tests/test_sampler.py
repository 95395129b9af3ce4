"""The loop that all methods share: where texts end, seeds, many prompts, figures; and that a GPU
can record a step: its shapes are fixed, it writes in place, and it does not wait for the device."""
import gc
import itertools
import re
import weakref

import naive
import numpy as np
import pytest
import torch
from common import REAL, options, random_lookahead, tiny
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pass_sampler import METHODS, Params, Sampler, generate
from support.errors import InputError


def run(llama, method, prompts, n, params, **more):
    """`generate` with the options that the method needs."""
    return generate(llama, prompts, method, params, n, **options(method, llama), **more)


def sampler(code, llama, method, settings, rows, context, parts=()):
    """A Sampler with the options that its method needs."""
    params = code.pass_sampler.Params(*settings)
    words = options(method, llama, parts)
    return code.pass_sampler.Sampler(llama, method, params, rows, context, **words)


# ------------------------------------------ where texts end

def test_stops(code=REAL):
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


def test_ended_rows(code=REAL):
    """A row that has ended commits nothing, whatever the others do."""
    llama = code.tiny(30, context=400)
    for method in METHODS:
        s = sampler(code, llama, method, (1,), 2, 60)
        s.generate([[1], [2]], 4)
        s.alive.copy_(torch.tensor([0, 1]))
        with torch.inference_mode():
            before = [cache.length.clone() for _, cache, _ in s.caches]
            s.next_step()
        for (_, cache, _), length in zip(s.caches, before):
            assert cache.length[0] == length[0], f"{method}: a row that has ended commits tokens"
            assert cache.length[1] > length[1], f"{method}: a row that goes on commits nothing"


# ----------------------------- seeds, many prompts, figures

@pytest.mark.parametrize("method", METHODS)
def test_seeds_and_many_prompts(method):
    """The same seed gives the same text, from a Sampler that has served other prompts too."""
    llama = tiny(30)
    s = sampler(REAL, llama, method, (1,), 8, 40)
    prompts = [[1, 2]] * 8
    texts = s.generate(prompts, 12, 1)["tokens"]
    assert len({tuple(row) for row in texts}) == 8
    assert s.generate(prompts, 12, 2)["tokens"] != texts
    s.generate([[5, 6, 7, 8, 9, 10], [3]], 30, 3)
    assert s.generate(prompts, 12, 1)["tokens"] == texts
    assert run(llama, method, prompts, 12, Params(1), seed=1)["tokens"] == texts


def test_long_prompts_are_prefilled_in_blocks(monkeypatch):
    llama, prompts = tiny(30, context=256), [list(range(20)) * 4, [1], list(range(9))]
    texts = lambda: run(llama, "pass", prompts, 20, Params(1))["tokens"]
    whole = texts()
    monkeypatch.setattr(REAL.pass_sampler, "PREFILL", 8)
    assert texts() == whole


def test_streamed_tokens_are_the_result():
    llama, seen = tiny(30), [[], []]
    note = lambda row, token, from_draft: seen[row].append((token, from_draft))
    result = run(llama, "pass", [[1], [2, 3, 4]], 20, Params(1), on_token=note)
    assert seen == [list(zip(*row)) for row in zip(result["tokens"], result["from_draft"])]
    own = [row.count(False) for row in result["from_draft"]]  # one per pass, but where a text ends
    assert result["passes"] - max(own) in (0, 1) and min(own) < 20


def test_figures(code=REAL):
    """Counted again from which tokens were drafts. A step of `pass` is a token of the
    model's own, the drafts that were kept, and one more of its own."""
    s = sampler(code, code.tiny(30, context=300), "pass", (1,), 2, 300)
    result = s.generate([[1], [2] * 100], 400)
    lengths = [len(row) for row in result["tokens"]]
    assert lengths == [299, 200]
    steps, counts = [], []
    for flags in result["from_draft"]:
        marks = "".join("d" if flag else "-" for flag in flags)
        found = re.findall("-d*-?", marks)
        steps.append(len(found))
        counts += [step.count("d") for step in found]
    shares = [sum(count > i for count in counts) / len(counts) for i in range(3)]
    assert result["accepted_at_least"] == pytest.approx(shares, abs=1e-4)
    assert 0.05 < shares[0] < 0.95
    assert result["steps"] == steps and result["passes"] == 2 * max(steps)
    assert result["tokens_per_pass"] == round(sum(lengths) / 2 / sum(steps), 4)


def test_memory(code=REAL):
    """Not a bit of plain decoding depends on what a look-ahead adds; nor do ordinary columns
    beside a memory in the cache."""
    llama = code.tiny(50)
    memory = code.random_lookahead(llama, 1).memory
    plain = code.model.Cache(llama, 2, 9)
    beside = code.lookahead.MemoryCache(code.model.Cache(llama, 2, 9), memory)
    for T in (4, 1):
        x = torch.arange(T).expand(2, T)
        a, b = llama(x, plain), llama(x, beside)
        assert (a - b).abs().max() < 1e-12, "the text sees the memory: the model is not untouched"
        plain.commit(T), beside.commit(T)
    reads = code.lookahead.block_mask(beside, 1, 2)  # a token, a look-ahead column
    h, with_memory = llama(x.repeat(1, 2), plain), llama(x.repeat(1, 2), beside, mask=reads)
    off = (h - with_memory).abs().amax((0, 2))
    assert off[0] < 1e-12 and off[1] > 1e-2, "the memory is not seen by those that ask for it"


# ------------------------------------ what a GPU can record

WAITS = {"item", "is_nonzero", "_local_scalar_dense", "nonzero", "masked_select"}


class Record(TorchDispatchMode):
    """Keeps the calls of operations, of which none may wait for the device."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert name not in WAITS, f"a step waits for the device, by {name}"
        result = function(*args, **kwargs or {})
        self.calls.append((function, args, kwargs or {}, result))
        return result


class OnPaper:
    """In the place of `Replay`: a CUDA graph without a GPU. The first call runs a function, the
    second runs and records it. Later calls make the recorded calls again on the recorded tensors;
    each result is written over the recorded one. So whatever Python decided is frozen, and only
    what lives in tensors moves on."""

    def __init__(self):
        self.ran = False
        self.calls = None
        self.capture_seconds = 0.0

    def __call__(self, function):
        if self.calls is not None:
            for operation, args, kwargs, result in self.calls:
                new = operation(*args, **kwargs)
                for old, again in zip(tree_leaves(result), tree_leaves(new)):
                    if torch.is_tensor(old) and old.data_ptr() != again.data_ptr():
                        old.copy_(again)
        elif self.ran:
            with Record() as record:
                self.result = function()
            self.calls = record.calls
        else:
            self.result = function()
        self.ran = True
        return self.result


def test_recordable(code=REAL):
    """Steps that are replayed write what steps that are run write: prompts of other lengths, a row
    that ends while others go on, a Sampler used twice. So their shapes are fixed, they wait for
    nothing, and what outlives them is written in place."""
    prompts = [[1, 2], [3], [4] * 9]
    for method, settings in itertools.product(METHODS, [(0,), (0.9, 5, 0.9)]):
        texts = []
        for replay in (None, OnPaper()):
            s = sampler(code, code.tiny(30), method, settings, 3, 60, ("memory", "head"))
            s.replay = replay or s.replay
            for _, cache, _ in s.caches:
                cache.reads_all = True  # as on a GPU
            made = [s.generate(prompts, 16, 1)["tokens"]]
            stop = made[0][1][4]
            made.append(s.generate(prompts, 16, 1, stop_tokens=[stop])["tokens"])
            made.append(s.generate([[5] * 20, [6, 7]], 24, 2)["tokens"])
            texts.append(made)
        assert texts[0] == texts[1], (
            f"{method}, {settings}: replayed, a step writes another text: it rebinds what a graph "
            f"would not see, or decides in Python")


@pytest.mark.parametrize("method, L, parts, most", [
    ("autoregressive", 0, (), 16), ("pass", 4, (), 60), ("pass", 3, ("memory", "head"), 100),
    ("fused", 1, ("memory", "head"), 68), ("fused", 3, ("memory", "head"), 94),
    ("tree", 3, ("memory", "head"), 151)])
def test_the_work_of_a_step(method, L, parts, most, monkeypatch):
    """The operations outside of the model's passes that are no views: each is a kernel on a GPU,
    and 5 to 10 microseconds of a step on a CPU. Their number does not creep up."""
    for temperature in (0, 1):
        llama = tiny(30, dtype=torch.float32)
        words = options(method, llama, parts)
        if L:
            words["lookahead"] = random_lookahead(llama, L, parts)
        if "tree" in words:
            words["tree"] = "0 1 00"
        s = Sampler(llama, method, Params(temperature), 1, 40, **words)
        for _, cache, _ in s.caches:
            cache.reads_all = True
        s.generate([[1, 2]], 4)
        forward, record = llama.forward, Record()

        def unrecorded(*given, **more):
            before = len(record.calls)
            h = forward(*given, **more)
            del record.calls[before:]
            return h

        monkeypatch.setattr(llama, "forward", unrecorded)
        with torch.inference_mode(), record:
            s.next_step()
        count = sum(not function.is_view for function, *_ in record.calls)
        assert count <= most, f"{count} operations outside of the passes"


# ------------------------------------------ what is refused

NO_STOPS = "stop_tokens must be a list of token ids from 0 to 29"


@pytest.mark.parametrize("change, says", [
    ({"method": "magic"}, "there is no method 'magic', only autoregressive, pass, "),
    ({"lookahead": 1}, "lookahead has no effect on method autoregressive"),
    ({"method": "pass", "lookahead": 1, "tree": "0"}, "tree has no effect on method pass, which"),
    ({"method": "pass"}, "pass needs a lookahead"),
    ({"method": "fused", "lookahead": None}, "fused needs a lookahead"),
    ({"method": "draft-model"}, "needs a draft_model"),
    ({"prompts": []}, "at least one prompt"), ({"max_new_tokens": 0}, "one new token"),
    ({"prompts": [1, 2]}, "list of lists"), ({"prompts": [[]]}, "prompt is empty"),
    ({"prompts": [[1] * 64]}, "shorten the"), ({"prompts": [[1, 2.0]]}, "lists of token ids"),
    ({"prompts": [[1, 30]]}, "tokens from 1 to 30"), ({"prompts": [[-1]]}, "tokens from -1"),
    *[({"stop_tokens": stops}, NO_STOPS) for stops in (5, "5", ["5"], [30], [-1], [1.0], [None])],
    ({"prompts": torch.rand(2, 2)}, "lists of token ids"), ({"prompts": 5}, "list of lists"),
    ({"prompts": [b"ab"]}, "list of lists"), ({"max_new_tokens": 1.5}, "one new token"),
    ({"seed": 1.5}, "seed must be"), ({"seed": None}, "seed must be"),
], ids=str)
def test_what_is_refused(change, says):
    """Options that a method has not, prompts that cannot be continued, ids that are none."""
    words = {"prompts": [[1]], "method": "autoregressive"} | change
    with pytest.raises(InputError, match=says):
        generate(tiny(30), **words)


@pytest.mark.parametrize("integers", [tuple, np.array, torch.tensor, set], ids=str)
def test_integers_of_other_packages(integers):
    """Prompts and stop tokens may be what numpy and torch have in place of a list of integers."""
    llama = tiny(30)
    plain = run(llama, "autoregressive", [[1]], 20, Params(1))["tokens"][0]
    text = run(llama, "autoregressive", [integers([1])], np.int64(20), Params(1),
               stop_tokens=integers([plain[9]]))["tokens"][0]
    assert text == plain[:plain.index(plain[9]) + 1]


@pytest.mark.parametrize("change", [
    {"temperature": "1"}, {"temperature": torch.rand(2)}, {"top_k": 1.5}, {"top_p": None}], ids=str)
def test_parameters_of_other_types(change):
    with pytest.raises(InputError, match="temperature and top-k must be"):
        Params(**change)


@pytest.mark.parametrize("change", [{"rows": 0}, {"rows": 1.5}, {"context": "9"}, {"context": 0}])
def test_a_sampler_of_no_size(change):
    with pytest.raises(InputError, match=f"{[*change][0]} must be"):
        Sampler(tiny(30), "autoregressive", **change)


def test_stop_tokens():
    """They take the place of the model's, and none at all lets a text go on."""
    llama = tiny(30, stop=(7,))
    end_at = lambda stops: run(llama, "autoregressive", [[1]], 60, Params(1), stop_tokens=stops)
    text = end_at([])["tokens"][0]
    assert len(text) == 60
    for stop in (text[3], text[20]):
        result = end_at([stop])
        end = text.index(stop) + 1
        assert result["tokens"][0] == text[:end] and result["stop_reason"] == ["stop"]


def test_a_sampler_refuses_more_than_it_has_room_for():
    s = Sampler(tiny(30), "autoregressive", rows=2, context=9)
    for prompts, says in (([[1]] * 3, "3 prompts for a Sampler of 2"), ([[1] * 9], "at most 9")):
        with pytest.raises(InputError, match=says):
            s.generate(prompts)


@pytest.mark.parametrize("method", METHODS)
def test_what_a_prompt_left_in_the_cache_does_not_reach_the_next(method):
    """Even numbers that are not finite, in all slots that it has used."""
    s = sampler(REAL, tiny(30, dtype=torch.float32), method, (0,), 2, 60)
    expected = s.generate([[1, 2], [3]], 9)["tokens"]
    s.generate([[4, 5] * 9, [6] * 20], 9)
    for _, cache, columns in s.caches:
        cache.reads_all = True
        cache.kv[:, :, :, :, cache.first:][:, :, :, :, :max(cache.length) + columns] = torch.nan
    assert s.generate([[1, 2], [3]], 9)["tokens"] == expected


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("method", METHODS)
def test_logits_that_are_not_finite_are_reported(method, temperature):
    """Weights that are finite can still overflow."""
    for weight in (float("nan"), 3e38):
        llama = tiny(30, dtype=torch.float32)
        llama.norm.fill_(weight)
        llama.output.mul_(1e3)
        with pytest.raises(InputError, match="not finite"):
            run(llama, method, [[1, 2]], 9, Params(temperature))


@pytest.mark.parametrize("method", [*METHODS][1:])
def test_drafts_of_numbers_that_are_not_finite(method):
    """They are rejected, and the text is the model's."""
    llama = tiny(30, dtype=torch.float32)
    plain = run(llama, "autoregressive", [[1, 2]], 9, Params(0))["tokens"]
    words = options(method, llama, parts=("head",))
    spoilt = []
    if "draft_model" in words:
        spoilt.append(words["draft_model"].norm)
    if "lookahead" in words:
        spoilt += [words["lookahead"].head_out, words["lookahead"].embeddings]
    for part in spoilt:
        part.fill_(3e38)
        assert generate(llama, [[1, 2]], method, max_new_tokens=9, **words)["tokens"] == plain
        assert len(generate(llama, [[1, 2]], method, Params(1), 9, **words)["tokens"][0]) == 9


def test_freed(code=REAL):
    """A sampler is freed when nobody holds it, by counting references: the garbage collector comes
    late, and caches are large. So is the model, and what was given is as it was."""
    module = code.pass_sampler
    gc.disable()
    try:
        for method in METHODS:
            model = code.tiny(6)
            words = options(method, model, parts=("memory", "head"))
            before = dict(vars(words["lookahead"])) if "lookahead" in words else {}
            s = module.Sampler(model, method, module.Params(1), 1, 20, **words)
            s.generate([[1, 2]], 4)
            for name, part in before.items():
                assert vars(words["lookahead"])[name] is part, f"{method} changes its look-ahead"
            freed, gone = weakref.ref(s), weakref.ref(model)
            del s, model
            assert freed() is None, f"a sampler of {method} is kept by itself"
            gc.collect()
            assert gone() is None, f"{method} keeps the model"
    finally:
        gc.enable()
