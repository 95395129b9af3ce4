"""Training: the gradients are those of the stated objectives, the columns are those that the sampler will run, the model stays
frozen, and an interrupted or shared run ends where an undisturbed one does."""
import contextlib
import copy
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file

import pass_sampler
import train_lookahead
from common import REAL, ROOT, random_lookahead, run_main, tiny
from files import InputError, load_tokenizer
from model import Cache, Llama, attention
from pass_sampler import Lookahead


@pytest.fixture(autouse=True)
def short_evaluation(request, monkeypatch):
    """Texts to measure on are written at one temperature, but where the file is looked at."""
    if "and_nothing_else" not in request.node.name:
        monkeypatch.setattr(train_lookahead, "TEMPERATURES", (1.0,))


def check_gradients(code, objectives=("ce", "kl", "tv")):
    """Against autograd through the definitions, in pieces of 3 columns."""
    for objective in objectives:
        model, g = tiny(11), torch.Generator().manual_seed(0)
        h, target = (torch.randn(8, 16, dtype=torch.float64, generator=g).requires_grad_(i == 0) for i in range(2))
        tokens = torch.randint(11, (8,), generator=g)
        p, q = model.logits(target).softmax(-1), model.logits(h).softmax(-1)
        expected = {"ce": F.nll_loss(q.log(), tokens, reduction="sum"), "kl": (p * (p / q).log()).sum(),
                    "tv": (p - q).abs().sum() / 2}[objective]
        loss, gradient = code.train_lookahead.loss_and_gradient(model, h.detach(), target, tokens, objective, columns=3)
        expected.backward()
        torch.testing.assert_close(loss.double(), expected.detach(), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(gradient, h.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("objective", ["ce", "kl", "tv"])
def test_gradient_is_that_of_the_objective(objective):
    check_gradients(REAL, [objective])


def check_columns(code):
    """A group trained after n tokens of a text gives the q that the sampler drafts from after those n
    tokens, and the p that judges them."""
    train_module, g = code.train_lookahead, torch.Generator().manual_seed(0)
    model = code.tiny(30)
    raw = code.random_lookahead(model, 3)
    lookahead = raw.ready(model)
    text, places = torch.randint(30, (2, 12), generator=g), torch.tensor([[1, 4, 8], [3, 4, 2]])
    offset = torch.tensor([0, 0])
    trained = copy.copy(raw)  # gradients flow, as in training
    trained.embeddings = raw.embeddings.clone().requires_grad_()
    read = train_module.prefix(model, text, offset, 9)
    h, target, tokens = train_module.states(model, trained, text, places, offset, *read)
    q = model.logits(h.detach()).softmax(-1).view(2, 3, 3, 30)
    p = model.logits(target).softmax(-1).view(2, 3, 3, 30)
    for row, group in [(b, m) for b in range(2) for m in range(3)]:
        n = int(places[row, group])
        given = text[row, n:n + 3]  # after the place: the model's own next token, then two drafts
        s = code.pass_sampler.Sampler(
            model, "pass", code.pass_sampler.Params(1), 1, 40, lookahead=raw)
        with torch.inference_mode():
            s.prefill([text[row, :n].tolist()])
            states = lookahead.forward(model, s.x, s.caches[0][1])[:, 1:]
            drawn = iter(given[1:].tolist() + [0])
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(code.lookahead, "draw", lambda q, u: torch.tensor([[next(drawn)]]))
                drafted = lookahead.draft(
                    model, s.params, states, model.logits(states), given[:1][None], torch.rand(1, 3))[1]
        torch.testing.assert_close(
            drafted[0], q[row, group], msg="the sampler drafts from other q than were trained")
        whole = model(text[row:row + 1], code.model.Cache(model, 1, 12))
        expected = model.logits(whole)[0, n:n + 3].softmax(-1)
        torch.testing.assert_close(expected, p[row, group], msg="the target is not the model's")
        assert tokens.view(2, 3, 3)[row, group].tolist() == text[row, n + 1:n + 4].tolist(), (
            "LA_j is trained for another token than x_{n+1+j}")


def test_trained_columns_are_the_columns_of_the_sampler():
    check_columns(REAL)


def test_attention_for_training_is_the_attention_of_sampling():
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 8, dtype=torch.float64, generator=g) for n in (4, 6, 6))
    for mask in torch.randn(2, 2, 1, 4, 6, dtype=torch.float64, generator=g):
        with_gradient = attention(q.clone().requires_grad_(), k, v, mask)
        torch.testing.assert_close(with_gradient, attention(q, k, v, mask))


def test_positions_may_be_shifted_together():
    """Rotary attention is relative: without memory a common offset changes nothing; the memory is not rotated, so it does."""
    model, g = tiny(30), torch.Generator().manual_seed(0)
    text, places = torch.randint(30, (1, 12), generator=g), torch.tensor([[2, 7]])
    for lookahead, same in ((Lookahead(random_lookahead(model, 2).embeddings), True),
                            (random_lookahead(model, 2), False)):
        a, b = (train_lookahead.states(model, lookahead, text, places, offset, *train_lookahead.prefix(model, text, offset, 4))[0]
                for offset in (torch.tensor([0]), torch.tensor([40])))
        assert torch.allclose(a, b, atol=1e-4) == same


def check_frozen(code):
    """Two steps of training leave every weight of the model as it was, and change every part of the look-ahead."""
    model, pool = code.tiny(30, context=200), torch.randint(30, (900,), generator=torch.Generator().manual_seed(0))
    before, table = copy.deepcopy(model.state_dict()), {"1.0": {"by_position": [], "expected": 0}}
    code.train_lookahead.own_texts, code.train_lookahead.evaluate = (lambda *_, **__: None), (lambda *_, **__: table)
    with tempfile.TemporaryDirectory() as folder:
        args = SimpleNamespace(length=2, memory=2, head=3, batch=8, objective="tv", seed=0, steps=2, resume=False,
                               out=Path(folder) / "file")
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            code.train_lookahead.train(args, model, pool, pool, {})
        trained = load_file(args.out)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items()), "a frozen weight moved"
    start = code.train_lookahead.initial(model, pool, 2, 2, 3, 0)
    assert all(not torch.equal(trained[name], part.bfloat16()) for name, part in start.items()), "a part was not trained"


def arguments(folder, data, out, *more):
    return ["--model", folder, "--data", data, "--length", 2, "--memory", 3, "--head", 4, "--out", out, *more]


def train(capsys, *words):
    return run_main(train_lookahead, capsys, *words)


def test_trains_the_lookahead_and_nothing_else(folder, data, tmp_path, capsys, monkeypatch):
    models, load = [], Llama.load.__func__
    monkeypatch.setattr(Llama, "load", classmethod(lambda cls, *a, **k: models.append(load(cls, *a, **k)) or models[0]))
    code, out, err = train(capsys, *arguments(folder, data, tmp_path / "a.safetensors", "--steps", 200, "--objective", "kl"))
    assert code == 0 and "a.safetensors: 200 steps" in out, err
    before = load_file(folder / "model.safetensors")
    assert all(torch.equal(tensor, before[name]) for name, tensor in models[0].named_weights().items()), "a frozen weight moved"
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        about = json.loads(file.metadata()["lookahead"])
        assert sorted(file.keys()) == ["embeddings", "head_in", "head_out", "memory"]
        assert file.get_tensor("head_out").abs().max() > 0
    trained = about["acceptance"]
    assert list(trained) == ["0.0", "0.6", "1.0"] and len(trained["1.0"]["by_rank"]) == 2
    for row in trained.values():  # a first draft is one candidate; more of them can only help
        for share, ranks in zip(row["by_position"], row["by_rank"]):
            assert abs(share - ranks[0]) < 2e-4 and ranks == sorted(ranks) and len(ranks) == 5
    assert about["settings"]["objective"] == "kl" and about["steps"] == 200
    train(capsys, *arguments(folder, data, tmp_path / "b.safetensors", "--steps", 1, "--objective", "kl"))
    with safe_open(tmp_path / "b.safetensors", "pt") as file:
        untrained = json.loads(file.metadata()["lookahead"])["acceptance"]
    assert trained["1.0"]["by_position"][0] > untrained["1.0"]["by_position"][0] + 0.02
    assert [name.name for name in tmp_path.iterdir() if "checkpoint" in name.name or "tmp" in name.name] == []
    code, out, _ = train(capsys, "--model", folder, "--data", data, "--evaluate", "mean", tmp_path / "a.safetensors")
    assert code == 0 and [line.split(" | ")[0] for line in out.splitlines()[2:]] == ["| mean", "| a"]


KILL = """
import os, signal, sys
import train_lookahead as t
from files import run_script
import files
t.CHECKPOINT_SECONDS, t.STEPS, save, calls = 0, 2, files.save_file, []
def dies_in_the_middle_of_a_write(tensors, path, metadata):
    save(tensors, path, metadata)
    calls.append(path)
    if len(calls) == 4:
        with open(path, "r+b") as file:
            file.truncate(os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
files.save_file = dies_in_the_middle_of_a_write
run_script(t.main)
"""


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_killed_and_resumed_ends_bit_for_bit_the_same(folder, data, tmp_path, capsys, monkeypatch):
    """Killed after step 3 of 8 where texts serve for two steps: the run goes on amid them and reads new ones."""
    monkeypatch.setattr(train_lookahead, "STEPS", 2)
    words = lambda out: [str(w) for w in arguments(folder, data, tmp_path / out, "--steps", 8)]
    code, _, err = train(capsys, *words("undisturbed"), "--resume")
    assert code == 0 and "nothing to resume" in err
    (tmp_path / "ordinary").touch()
    assert (tmp_path / "undisturbed").stat().st_mode == (tmp_path / "ordinary").stat().st_mode
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    killed = subprocess.run([sys.executable, "-c", KILL, *words("killed")], env=environment, capture_output=True)
    assert killed.returncode == -signal.SIGKILL and not (tmp_path / "killed").exists() and (tmp_path / "killed.checkpoint").exists()
    code, out, err = train(capsys, *words("killed"), "--resume")
    assert code == 0 and "8 steps" in out and "step 3, " in err and "step 0, " not in err
    assert digest(tmp_path / "killed") == digest(tmp_path / "undisturbed")


def test_texts_are_read_anew_and_places_used_once(folder, data, tmp_path, capsys, monkeypatch):
    seen, backward = [], train_lookahead.backward
    monkeypatch.setattr(train_lookahead, "STEPS", 3)
    monkeypatch.setattr(train_lookahead, "backward", lambda model, parts, objective, text, places, *more: seen.append((text, places))
                        or backward(model, parts, objective, text, places, *more))
    train(capsys, *arguments(folder, data, tmp_path / "out", "--steps", 6, "--batch", 5))
    texts = [text.tolist() for text, _ in seen]
    assert len(texts[0]) == 5 and texts[0] == texts[1] == texts[2] != texts[3] == texts[4] == texts[5]
    for row in torch.cat([places for _, places in seen[:3]], 1).tolist():
        assert len(set(row)) == 3 * train_lookahead.GROUPS and 1 <= min(row) <= max(row) <= train_lookahead.TEXT - 1 - 2


def test_files_that_are_no_text_are_left_out(folder, data, tmp_path):
    tokenizer = load_tokenizer(folder, 320)
    before = train_lookahead.read_data(tokenizer, [data], "")
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "data" / "12.pyc").write_bytes(b"text\0" * 999)
    assert all(map(torch.equal, before, train_lookahead.read_data(tokenizer, [tmp_path / "data"], "")))


def test_trains_on_texts_that_the_model_writes(folder, data, tmp_path, capsys, monkeypatch):
    """As many as were asked for, in equal parts by temperature; the greedy ones are the model's own continuation of their prompts."""
    written = []
    monkeypatch.setattr(train_lookahead, "train", lambda args, model, pool, held, settings: written.append((model, pool)))
    assert train(capsys, *arguments(folder, data, tmp_path / "out", "--from-model", 0, 1, "--texts", 6))[0] == 0
    (model, pool), = written
    assert pool.shape == (6, train_lookahead.TEXT) and model.config.stop_tokens == (2,)
    h = model(pool[:, :-1], Cache(model, 6, train_lookahead.TEXT))
    best = (model.logits(h).argmax(-1) == pool[:, 1:])[:, 47:].float().mean(1)
    assert (best[:3] > 0.95).all() and (best[3:] < 0.95).all()


def test_two_processes_end_where_one_does(folder, data, tmp_path, capsys):
    for name, more in (("one", []), ("other", ["--seed", 1])):
        assert train(capsys, *arguments(folder, data, tmp_path / name, "--steps", 4), *more)[0] == 0
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", ROOT / "train_lookahead.py",
                    *map(str, arguments(folder, data, tmp_path / "two", "--steps", 4))], check=True, capture_output=True,
                   env={**os.environ, "OMP_NUM_THREADS": "1"})
    one, two, other = (load_file(tmp_path / name) for name in ("one", "two", "other"))
    for name in one:  # rounding, in bfloat16, is far from what other texts would have made
        assert (one[name] - two[name]).float().norm() < 0.1 * (one[name] - other[name]).float().norm(), name


@pytest.mark.parametrize("change, says", [
    (["--length", "0"], "must be 1 to 64"), (["--steps", "0"], "must be positive"), (["--data", "nowhere"], "nowhere does not exist"),
    (["--memory", "9999"], "--memory 0 to"), (["--batch", "0"], "--batch at least 1"), (["--minutes", "nan"], "must be positive"),
    (["--suffix", ".rs"], "0 files"), (["--out", "/nowhere/file"], "its folder must exist"), (["--evaluate", "nowhere"], "or --evaluate"),
    (["--from-model", "0.6", "-1"], "temperature and top-k must be"), (["--from-model", "0", "1", "--texts", "1"], "at least one a temperature"),
])
def test_bad_input(change, says, folder, data, tmp_path, capsys):
    code, out, err = train(capsys, *arguments(folder, data, tmp_path / "out"), *change)
    assert code == 2 and says in err and err.count("\n") == 1 and list(tmp_path.iterdir()) == []


def test_lookahead_of_another_model_is_refused(folder, data, tmp_path, capsys):
    train(capsys, *arguments(folder, data, tmp_path / "a.safetensors", "--steps", 1))
    other, tokenizer = tiny(321, dtype=torch.float32), load_tokenizer(folder, 320)
    with pytest.raises(InputError, match="another model"):
        pass_sampler.load_lookahead(tmp_path / "a.safetensors", other, tokenizer)
