"""Training: the losses are the stated ones, the columns those that the sampler will run, what is
measured is what it will accept; the model stays frozen; an interrupted or shared run ends where an
undisturbed one does."""
import copy
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import naive
import pytest
import torch
from common import REAL, ROOT, run_main, tiny
from safetensors import safe_open
from safetensors.torch import load_file

import beyond.own_texts
import train_lookahead
from beyond.training import initial_memory, initial_parts
from model import Cache, Config, Llama
from support.checkpoint import fingerprint, read_texts
from support.data import Texts, long_enough, read_data, split_files
from support.errors import InputError
from support.storage import write_tensors
from support.tokenizer import load_tokenizer

SMALL = ["--length", "2", "--memory", "3", "--head", "4"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture(autouse=True)
def short_evaluation(request, monkeypatch):
    """Texts to measure on are written at one temperature, but where the file is looked at."""
    if "trains_the_lookahead" not in request.node.name:
        monkeypatch.setattr(train_lookahead, "TEMPERATURES", (1.0,))


# -------------------------------------------------- the method

def test_gradients(code=REAL):
    """Against autograd through the definitions, in pieces of 3 of 8 columns."""
    for objective in ("ce", "kl", "tv"):
        model, g = tiny(11), torch.Generator().manual_seed(0)
        h, target = torch.randn(2, 8, 16, dtype=torch.float64, generator=g)
        h.requires_grad_()
        tokens = torch.randint(11, (8,), generator=g)
        p, q = model.logits(target).softmax(-1), model.logits(h).softmax(-1)
        losses = {
            "ce": -q[torch.arange(8), tokens].log(),
            "kl": (p * (p / q).log()).sum(1),
            "tv": (p - q).abs().sum(1) / 2,
        }
        expected, = torch.autograd.grad(losses[objective].mean(), h)
        loss = code.train_lookahead.backward(model, h, tokens, objective, model, target, columns=3)
        close = partial(torch.testing.assert_close, atol=1e-5, rtol=1e-5)
        close(loss.double(), losses[objective].mean().detach())
        close(h.grad, expected)


def test_columns(code=REAL):
    """A group trained after n tokens of a text gives the q that is drafted from after those n
    tokens, and the p that judges it: both as in tests/naive.py."""
    for parts in ((), ("memory", "head")):
        check_columns(code, parts)


def check_columns(code, parts):
    model, g = code.tiny(5), torch.Generator().manual_seed(0)
    lookahead = code.random_lookahead(model, 3, parts)
    judge = naive.Model(model, lookahead)
    lookahead.embeddings.requires_grad_()  # gradients flow, as in training
    text, places = torch.randint(5, (2, 9), generator=g), torch.tensor([[1, 4], [3, 2]])
    offset = torch.tensor([0, 0])
    read = code.train_lookahead.prefix(model, text, offset, 6)
    h, target, tokens = code.train_lookahead.states(
        model, lookahead, text, places, offset, *read)
    q, p = (model.logits(states.detach()).view(2, 2, 3, 5) for states in (h, target))

    def agree(logits, expected, says):
        assert torch.allclose(logits, torch.tensor(expected).double(), atol=1e-5), says

    for row, group, j in itertools.product(range(2), range(2), range(3)):
        given, n = text[row].tolist(), int(places[row, group])
        after = given[n:n + 1 + j]  # the model's own next token, then drafts
        agree(q[row, group, j], judge.draft_logits(given[:n], after),
              "the sampler drafts from other q than were trained")
        agree(p[row, group, j], judge.next_logits(given[:n] + after),
              "the target is not the model's")
        assert tokens.view(2, 2, 3)[row, group, j] == given[n + 1 + j], (
            "LA_j is trained for another token than x_{n+1+j}")


def test_expected(code=REAL):
    """E[accepted drafts] as measured on texts, against the sum over all first drafts x and second
    drafts y: sum_x m1(x) (1 + sum_y m2(y) (1 + sum_z m3(z))), m = min(p, q) after x and y."""
    model, g = code.tiny(4), torch.Generator().manual_seed(3)
    lookahead = code.random_lookahead(model, 3).ready(model)
    train_module, n = code.train_lookahead, 40
    text = torch.randint(4, (1, n + 4), generator=g).repeat(16, 1)
    texts = Texts.of(text.tolist(), [n] * 16, 1.0, [True] * 16)  # In these is one place.
    x, y = torch.arange(16) // 4, torch.arange(16) % 4
    text[:, n + 1] = x  # what LA_1 guesses
    text[:, n + 2] = y
    texts = texts._replace(tokens=text)
    with torch.no_grad():
        share, chain = train_module.measure(
            model, lookahead, code.pass_sampler.Params(1), texts, 0, g, train_module.accepted_once)
        share, chain = (x[::train_module.MEASURED_PLACES] for x in (share, chain))
        places, offset = torch.full((16, 1), n), torch.zeros(16, dtype=torch.long)
        read = train_module.prefix(model, text, offset, 3)
        h, target, _ = train_module.states(model, lookahead, text, places, offset, *read)
        p, q = (model.logits(states).softmax(-1).view(16, 3, 4) for states in (target, h))
    both, rows = torch.minimum(p, q), torch.arange(16)
    torch.testing.assert_close(share[:, :, 0], both.sum(2))
    after_y = both[rows, 1, y] * (1 + both[:, 2].sum(1))
    after_x = both[::4, 0].diagonal() * (1 + after_y.view(4, 4).sum(1))
    weight = p[rows, 0, x] * p[rows, 1, y]
    torch.testing.assert_close((weight * chain).sum(), after_x.sum())


def test_evaluate(code=REAL):
    """At temperature 0 a draft is accepted where q and p have the same best token; with a memory,
    that depends on the position."""
    model, g = code.tiny(4, context=200), torch.Generator().manual_seed(0)
    module, lookahead = code.train_lookahead, code.random_lookahead(model, 2)
    text, tables = torch.randint(4, (6, 80), generator=g), []
    parts = [Texts.of(text.tolist(), [40] * 6, t, [True] * 6) for t in (0.0, 1.0)]
    for position in (0, 40):
        table = module.evaluate(model, lookahead, Texts.joined(parts), position)
        spread = (torch.arange(module.MEASURED_PLACES) + 0.5) / module.MEASURED_PLACES
        places = (40 + spread * (40 - 2)).long().expand(6, -1)
        offset = torch.full((6,), position)
        with torch.no_grad():
            read = module.prefix(model, text, offset, 2 * places.shape[1])
            h, target, _ = module.states(model, lookahead, text, places, offset, *read)
        same = model.logits(h).argmax(-1) == model.logits(target).argmax(-1)
        expected = same.double().view(-1, 2).mean(0).tolist()
        assert table[0.0]["by_position"] == pytest.approx(expected, abs=1e-4), (
            "what is measured at temperature 0 is not what greedy drafts would be accepted")
        tables.append(table[1.0]["by_position"])
    assert tables[0] != tables[1], "the position of the first token is ignored"


def test_what_training_begins_with():
    """Keys of the memory are not rotated: one token has the same in every slot of the first layer.
    A new head corrects nothing. The rate rises for ten steps, and falls to 0."""
    model, g = tiny(30), torch.Generator().manual_seed(0)
    keys = initial_memory(model, torch.tensor([[5, 7, 5]]))[0, 0]
    assert torch.allclose(keys[0], keys[2]) and not torch.allclose(keys[0], keys[1])
    parts = initial_parts(model, torch.arange(9), SimpleNamespace(memory=0, head=4), g)
    assert not parts["head_out"].any() and parts["head_in"].shape == (4, 32)
    rates = [train_lookahead.rate(step, 100) for step in (0, 4, 10, 50, 100)]
    assert rates == pytest.approx([0.1, 0.498, 0.976, 0.5, 0], abs=1e-3)


def test_frozen(code=REAL):
    """Two steps of training leave every weight of the model as it was, and change every part of
    the look-ahead."""
    train_module, g = code.train_lookahead, torch.Generator().manual_seed(0)
    model, pool = code.tiny(30, context=200), torch.randint(30, (900,), generator=g)
    before = copy.deepcopy(model.state_dict())
    args = SimpleNamespace(
        length=2, memory=2, head=3, batch=8, seed=0, steps=2, process=0, processes=1,
        start=None)
    parts = train_module.initial(model, pool, args)
    optimizer = train_module.optimizer_of(parts)
    for columns in train_module.batches(model, pool, args, 0):
        train_module.train_step(model, parts, optimizer, "tv", 1.0, columns)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name]), f"a frozen weight moved: {name}"
    for name, part in train_module.initial(model, pool, args).items():
        assert not torch.equal(parts[name], part), f"{name} was not trained"


# -------------------------------------------------- the script

@pytest.fixture
def words(folder, data):
    """words(out, ..): a command line of the script."""
    return lambda *more: [
        "--model", folder, "--data", data, "--objective", "tv", *SMALL, "--out", *more]


@pytest.fixture
def train(words, capsys):
    """train(out, ..) -> exit code, stdout, stderr."""
    return lambda *more: run_main(train_lookahead, capsys, *words(*more))


def lines_of(out):
    """What was measured while `out` was trained."""
    return [json.loads(line) for line in open(f"{out}.jsonl")]


def test_trains_the_lookahead(train, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(train_lookahead, "plan", lambda args: (32, 2))
    out = tmp_path / "a.safetensors"
    code, said, err = train(out, "--steps", 200, "--objective", "kl")
    assert code == 0 and "for 200 steps" in said and "min for the 197 steps left" in err, err
    with safe_open(out, "pt") as file:
        about = json.loads(file.metadata()["lookahead"])
        assert sorted(file.keys()) == ["embeddings", "head_in", "head_out", "memory"]
        assert file.get_tensor("head_out").abs().max() > 0
    trained = about["acceptance"]
    assert list(trained) == ["0.0", "0.6", "1.0"] and len(trained["1.0"]["by_rank"]) == 2
    for row in trained.values():  # a first draft is one candidate; more of them can only help
        for share, ranks in zip(row["by_position"], row["by_rank"]):
            assert share == ranks[0] and ranks == sorted(ranks) and len(ranks) == 5
    assert about["settings"]["objective"] == "kl" and about["steps"] == 200
    assert about["model"] == fingerprint(Config.load(folder))
    lines = lines_of(out)
    assert [line["step"] for line in lines] == [0, 100, 200]
    assert lines[-1]["acceptance"] == trained and lines[-1]["loss"] < lines[1]["loss"]
    first, last = (line["acceptance"]["1.0"]["by_position"][0] for line in (lines[0], lines[-1]))
    assert last > first + 0.02
    assert len([*tmp_path.iterdir()]) == 2  # no checkpoint is left


def test_plan(monkeypatch):
    """Short runs are measured at the end on two texts per temperature, and once before on one; long
    ones at the end on 32, and ten times before on 8."""
    monkeypatch.setattr(train_lookahead, "TEMPERATURES", (0.0, 0.6, 1.0))

    def plan(**sizes):
        return train_lookahead.plan(SimpleNamespace(**sizes))

    assert plan(steps=40, batch=8, length=4) == (2, 1)
    assert plan(steps=1000, batch=8, length=4) == (32, 5)
    assert plan(steps=10_000, batch=32, length=4) == (32, 10)


KILL = """
import os, signal
import train_lookahead as t
from support import errors, storage
t.add_beyond("training")
t.TEMPERATURES, t.CHECKPOINT_SECONDS, t.READ_FOR = (1.0,), 0, 2
save, calls = storage.save_file, []
def dies_in_the_middle_of_a_write(tensors, path, metadata):
    save(tensors, path, metadata)
    calls.append(path)
    if len(calls) == 4:
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
storage.save_file = dies_in_the_middle_of_a_write
errors.run_script(t.main)
"""


def test_killed_and_resumed_ends_bit_for_bit_the_same(train, words, data, tmp_path, monkeypatch):
    """Killed after step 3 of 8 where texts serve for two steps: the run goes on amid them and reads
    new ones."""
    monkeypatch.setattr(train_lookahead, "READ_FOR", 2)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert "beginning with step 0" in train(whole, "--steps", 8, "--resume")[2]
    shutil.copytree(data, tmp_path / "data")
    held = split_files([data], "")[1][0]  # only what is measured on differs
    (tmp_path / "data" / held.name).write_text(held.read_text() + "#")
    command = [sys.executable, "-c", KILL, *words(parts, "--steps", "8")]
    killed = subprocess.run(command, env=ENVIRONMENT, capture_output=True)
    assert killed.returncode == -signal.SIGKILL and not parts.exists()
    for more, says in (
            ([], "parts.checkpoint is there: give --resume"),
            (["--resume", "--head", 8], "made with other settings (head 4, now 8)"),
            (["--resume", "--data", tmp_path / "data"], "other settings (data and weights")):
        code, _, err = train(parts, "--steps", 8, *more)
        assert code == 2 and says in err
    code, out, err = train(parts, "--steps", 8, "--resume")
    assert code == 0 and "8 steps" in out and "going on from step 3" in err
    assert "there is nothing to resume" in train(parts, "--steps", 8, "--resume")[2]
    assert whole.read_bytes() == parts.read_bytes()
    lines = [[line | {"seconds": 0} for line in lines_of(path)] for path in (whole, parts)]
    assert lines[0] == lines[1]


def test_texts_are_read_anew_and_places_used_once(monkeypatch):
    monkeypatch.setattr(train_lookahead, "READ_FOR", 3)
    pool = torch.randint(30, (900,), generator=torch.Generator().manual_seed(0))
    args = SimpleNamespace(length=2, batch=5, steps=6, seed=0, process=0, processes=1)
    model = tiny(30, context=200)
    texts, places, offsets, *_ = zip(*train_lookahead.batches(model, pool, args, 0))
    offsets = torch.cat(offsets).tolist()
    assert len(set(offsets)) > 5
    assert 0 <= min(offsets) <= max(offsets) < 200 - train_lookahead.TEXT - 2
    texts = [text.tolist() for text in texts]
    assert texts[0] == texts[1] == texts[2] != texts[3] == texts[4] == texts[5]
    for row in torch.cat(places[:3], 1).tolist():
        assert len(set(row)) == 3 * train_lookahead.PLACES
        assert 1 <= min(row) <= max(row) <= train_lookahead.TEXT - 1 - 2
    # Of texts that the model wrote, places only in what it wrote; each text here is of one token.
    rows = [[i] * (20 + i) for i in range(30)]
    written = Texts.of(rows, [8] * 30, 1.0, [False] * 30)
    texts, places, *_ = zip(*train_lookahead.batches(model, written, args, 0))
    tokens = torch.cat([text[:, 0] for text in texts])
    assert len(tokens.unique()) > 5
    last = 20 + tokens[:, None] - 1 - 2
    assert (8 <= torch.cat(places)).all() and (torch.cat(places) <= last).all()
    assert (torch.cat(places) == last).any() and (torch.cat(places) == 8).any()
    ends = torch.tensor([[20], [30]])
    shares = torch.tensor([[0, 0.5, 1], [0, 0.5, 1]])  # Rounding can make a share 1.
    found = train_lookahead.places_of(torch.tensor([8, 8]), ends[:, 0], 2, shares)
    assert found.tolist() == [[8, 13, 17], [8, 18, 27]]


def test_what_is_left_out_of_the_data(folder, data, tmp_path, capsys):
    """Files that are no text, and hidden ones."""
    tokenizer, copied = load_tokenizer(folder, 320), tmp_path / "data"
    before = read_data(tokenizer, [data], "", 128)
    shutil.copytree(data, copied)
    (copied / "12.pyc").write_bytes(b"text\0" * 999)
    for name in (".git/objects", "more/.cache"):
        (copied / name).mkdir(parents=True)
        (copied / name / "a.txt").write_text("no text")
    assert all(map(torch.equal, before, read_data(tokenizer, [copied], "", 128)))
    assert "2 hidden files are left out" in capsys.readouterr().err


def test_a_loss_that_is_no_number_stops_the_training(train, tmp_path, monkeypatch):
    """In one line, and without a file that the sampler would call damaged."""
    no_number = lambda objective, logits, tokens, p: logits.sum() * torch.nan
    monkeypatch.setattr(train_lookahead, "loss_of", no_number)
    code, _, err = train(tmp_path / "out", "--steps", 20)
    assert code == 2 and "the loss of step 0 is nan, in float32" in err.splitlines()[-1]
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.checkpoint").exists()


def test_trains_on_texts_that_the_model_writes(train, folder, data, tmp_path, capsys):
    """As many as were asked for, a third per temperature; the greedy ones are the model's own
    continuation of their prompts. They are for that model alone."""
    texts = tmp_path / "texts"
    words = ["--model", folder, "--data", data, "--count", 6, "--out", texts]
    assert run_main(beyond.own_texts, capsys, *words)[0] == 0
    model = Llama.load(folder)
    pool = read_texts(texts, model.config)
    assert pool.held.tolist() == [False, False, True] * 3 and model.config.stop_tokens == (2,)
    assert pool.tokens.shape == (9, 128) and set(pool.end.tolist()) == {128}
    h = model(pool.tokens[:, :-1], Cache(model, 9, 128))
    best = (model.logits(h).argmax(-1) == pool.tokens[:, 1:])[:, 47:].float().mean(1)
    assert (best[:3] > 0.95).all() and (best[6:] < 0.95).all()
    code, out, err = train(tmp_path / "out", "--texts", texts, "--steps", 2)
    assert code == 0 and "2 steps" in out, err
    words = ["--model", folder, "--texts", texts, "--steps", 1, "--out", tmp_path / "more"]
    more = [*words, "--start", tmp_path / "out", "--length", 1]
    code, out, err = run_main(train_lookahead, capsys, *more)  # no --data: its held-out texts
    assert code == 0 and "drafts accepted per step" in err, err
    before, after = load_file(tmp_path / "out"), load_file(tmp_path / "more")
    assert len(after["embeddings"]) == 1 and after.keys() == before.keys()
    for name in ("memory", "head_in"):  # A step of Adam moves each number by a tenth of its rate.
        assert 0 < (after[name] - before[name]).abs().max() < 0.01
    assert "the file says it" in run_main(train_lookahead, capsys, *more, "--head", 4)[2]
    write_tensors({"texts": pool.tokens[:6].int()}, texts, {"texts": fingerprint(model.config)})
    old = read_texts(texts, model.config)  # as it was written before texts were held out
    assert old.begin.tolist() == [1] * 6 and old.end.tolist() == [128] * 6
    assert "hold no texts out" in run_main(train_lookahead, capsys, *words)[2]
    short = Texts.of([[5] * 4] * 6, [1] * 6, 1.0, [False] * 3 + [True] * 3)
    with pytest.raises(InputError, match="none with more than 3 new tokens"):
        long_enough(short.chosen(~short.held), 3)
    assert train(tmp_path / "old", "--texts", texts, "--steps", 1)[0] == 0
    for other in (folder / "model.safetensors", tmp_path / "out"):
        code, _, err = train(tmp_path / "out", "--texts", other)
        assert code == 2 and "no texts by this model" in err
    assert run_main(beyond.own_texts, capsys, *words, "--count", 7)[0] == 2


def test_two_processes_end_where_one_does(train, words, tmp_path):
    for name, seed in (("one", 0), ("other", 1)):
        train(tmp_path / name, "--steps", 4, "--seed", seed)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
               "2", ROOT / "train_lookahead.py", *words(tmp_path / "two", "--steps", "4")]
    subprocess.run(command, check=True, capture_output=True, env=ENVIRONMENT)
    one, two, other = (load_file(tmp_path / name) for name in ("one", "two", "other"))
    for name in one:  # rounding, in bfloat16, is far from what other texts would have made
        rounding = (one[name] - two[name]).float().norm()
        assert rounding < 0.1 * (one[name] - other[name]).float().norm(), name
    losses = [[line["loss"] for line in lines_of(tmp_path / name)[1:]] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=0.01)


@pytest.mark.parametrize("change, says", [
    (["--length", "0"], "length must be 1 to 64"), (["--suffix", ".rs"], "0 files"),
    (["--data", "nowhere"], "nowhere does not exist"),
    (["--head", "1000000000"], "head must be 0 to"),
    (["--out", "/nowhere/file"], "its folder must exist"),
    (["--texts", "nowhere"], "cannot read nowhere"),
])
def test_bad_input(change, says, train, tmp_path):
    code, out, err = train(tmp_path / "out", *change)
    assert code == 2 and says in err and err.count("\n") == 1 and list(tmp_path.iterdir()) == []
