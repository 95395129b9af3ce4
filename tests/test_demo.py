"""demo/: the model that ships with the repository, and the code that made it."""
import json
from argparse import Namespace
from functools import cache
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
import torch.nn.functional as F
from common import ROOT, run_main, tiny

import beyond.own_texts
import pass_sampler
from demo.recipes import distill, pretrain, to_gguf
from model import Cache, Config, Llama, has_fbgemm
from pass_sampler import Lookahead, Params, Sampler, generate, load_lookahead
from results import generation, page
from support.errors import InputError
from support.tokenizer import load_tokenizer

DEMO = ROOT / "demo" / "model"


# ------------------------------------------------------- the shipped model

@pytest.fixture(autouse=True)
def two_threads():
    """This model is large enough for them."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@cache
def demo():
    """The shipped model, its tokenizer and its look-ahead. Arithmetic is float32, as in `make demo`
    on an x86 CPU."""
    model = Llama.load(DEMO, torch.float16 if has_fbgemm("cpu") else torch.float32)
    tokenizer = load_tokenizer(DEMO, model.config.vocab_size)
    return model, tokenizer, load_lookahead(DEMO / "lookahead.safetensors", model)


@cache
def held_out_files():
    """What the model has not seen of this Python's standard library, normalised."""
    texts = []
    for _, name, source in pretrain.modules(Path("no wheels")):
        if pretrain.is_held(name):
            texts.append(pretrain.normal(source.decode(errors="replace")))
    return [text for text in texts if text]


@cache
def prompts(n, length=48):
    """n prompts from the middle of held-out files."""
    ids = [demo()[1].encode(text) for text in held_out_files()]
    ids = [i for i in ids if len(i) > 3 * length][:n]
    return [i[len(i) // 2:][:length] for i in ids]


def test_config_and_size():
    """It is what demo/recipes/pretrain.py makes, and small enough to lie in a repository."""
    assert json.loads((DEMO / "config.json").read_text()) == pretrain.CONFIG
    assert sum(path.stat().st_size for path in DEMO.iterdir()) < 30e6
    model = Llama(Config.load(DEMO), device="meta")
    assert 10e6 < sum(p.numel() for p in model.parameters()) < 14e6


def test_tokenizer_keeps_every_byte_of_held_out_files():
    _, tokenizer, _ = demo()
    assert len(held_out_files()) > 20
    strange = ["\ttabs\r\n  and   spaces  \n\n", "naïve 日本語 🙂 \x00", " leading"]
    for text in held_out_files() + strange:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("1234567")) == 8  # <s>, and each digit by itself


def test_model_knows_python():
    """Held-out loss near that in demo/README.md, 1.48; one that only knows the frequencies of
    tokens would be at about 6."""
    model, tokenizer, _ = demo()
    tokens = []
    for text in held_out_files()[:40]:
        tokens += tokenizer.encode(text)
    nats = pretrain.held_out(model, torch.tensor(tokens), texts=4)
    assert nats < 1.8


@pytest.mark.parametrize("method, options", [("pass", {}), ("tree", {"tree": "0 1 00"})])
def test_greedy_texts_are_the_same_over_long_texts(method, options):
    """4 texts of 128 tokens, one by one and as a ragged batch, are those of plain decoding."""
    model, _, lookahead = demo()
    texts = [p[:length] for p, length in zip(prompts(4), (48, 7, 30, 16))]
    plain = generate(model, texts, "autoregressive", Params(0), 128)["tokens"]
    options = {"lookahead": lookahead, **options}
    sampler = Sampler(model, method, Params(0), 1, 400, **options)
    single = [sampler.generate([t], 128) for t in texts]
    assert [r["tokens"][0] for r in single] == plain
    assert generate(model, texts, method, Params(0), 128, **options)["tokens"] == plain
    assert sum(r["passes"] for r in single) < sum(map(len, plain))  # drafts were accepted
    assert sum(map(len, plain)) > 350  # few ended early


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_acceptance_is_what_the_file_says(temperature):
    """The sampler accepts the first draft about as often as train_lookahead.py measured.

    16 texts of 64 tokens give 350 to 500 first drafts: standard error .027 if they were
    independent. The band is .1. Planted: without its memory and head the same look-ahead falls out.
    """
    model, _, lookahead = demo()
    table = lookahead.acceptance[temperature]["by_position"][0]

    def share(lookahead):
        result = generate(model, prompts(16), "pass", Params(temperature), 64, lookahead=lookahead)
        return result["accepted_at_least"][0]

    assert abs(share(lookahead) - table) < 0.1
    assert abs(share(Lookahead(lookahead.embeddings)) - table) > 0.1


# ------------------------------------------ how it was made

def test_normal_form():
    source = ('"""Doc."""\nimport os  # a comment\n\nclass A:\n    "doc"\n\n'
              'def f(x,\n      y = "b"):\n    """Doc."""\n    return {"a":x}\n')
    more = "def g():\n    return 'some more text to make it long enough to be worth it'\n"
    text = pretrain.normal(source + more * 4)
    assert text.startswith(
        "import os\n\nclass A:\n    pass\n\ndef f(x, y='b'):\n    return {'a': x}\n")
    assert pretrain.normal(text) == text
    assert pretrain.normal("def f(:") is None and pretrain.normal("x = 1\n") is None
    assert pretrain.normal("# Automatically generated by a tool\n" + text) is None
    assert pretrain.normal("X = 1234567\n" * 99) is None


def test_gradients_are_those_of_autograd():
    """Of all weights: the tied head's come from two places."""
    model = tiny(40, dtype=torch.float32, tied=True).requires_grad_()
    rows = torch.randint(40, (3, 12), generator=torch.Generator().manual_seed(0))
    loss = pretrain.loss_and_gradients(model, model.forward, rows, columns=7)
    ours = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    h = model(rows[:, :-1], Cache(model, 3, 11))
    expected = F.cross_entropy(model.logits(h).flatten(0, 1), rows[:, 1:].flatten())
    expected.backward()
    assert abs(loss - expected.item()) < 1e-5
    for name, p in model.named_parameters():
        torch.testing.assert_close(ours[name], p.grad, atol=1e-6, rtol=1e-4)


def test_killed_and_resumed_ends_where_undisturbed(tmp_path, monkeypatch):
    """Bit for bit; the texts get longer on the way."""
    small = dict(COLUMNS=128, CONTEXT=32, LENGTHS={16: 0.5, 32: 1}, CHECKPOINT_SECONDS=0,
                 EVALUATIONS=2)
    for name, value in small.items():
        monkeypatch.setattr(pretrain, name, value)
    tokens = torch.arange(2000) % 40

    def run(work, resume=False, until=99):
        model = tiny(40, dtype=torch.bfloat16, tied=True).requires_grad_()
        args = Namespace(steps=7, seed=0, resume=resume, compile=False, work=tmp_path / work)
        args.work.mkdir(exist_ok=True)
        pretrain.initialise(model, 0)

        def add_gradients(step):
            if step == until:
                raise KeyboardInterrupt
            rows = pretrain.rows_of(tokens, step, args)
            return pretrain.loss_and_gradients(model, model.forward, rows)

        def evaluate():
            return {"held": pretrain.held_out(model, tokens[:500])}

        curve = pretrain.train(
            model, args, {}, args.work / "checkpoint", add_gradients, evaluate)
        return curve, dict(model.named_parameters())

    curve, weights = run("whole")
    held = [measured["held"] for _, _, measured, *_ in curve]
    assert [row[0] for row in curve] == [4, 7] and held[1] < held[0]  # it learns to count
    with pytest.raises(KeyboardInterrupt):
        run("parts", until=5)
    resumed, again = run("parts", resume=True)
    assert [row[:3] for row in resumed] == [row[:3] for row in curve]
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert pretrain.picture(curve).count("<polyline") == 2


def test_a_draft_model_is_distilled(folder, data, tmp_path, capsys, monkeypatch):
    """It loads, drafts for the model, and agrees with it more often at the end than at first."""
    texts = tmp_path / "texts"
    out = tmp_path / "draft"
    words = ["--model", folder, "--data", data, "--count", 12, "--out", texts]
    assert run_main(beyond.own_texts, capsys, *words)[0] == 0
    for name, value in dict(WIDTH=16, LAYERS=1, HEADS=2, BATCH=4, HELD=2).items():
        monkeypatch.setattr(distill, name, value)
    table = tmp_path / "table.json"
    words = ["--model", folder, "--texts", texts, "--steps", 60, "--json", table, "--out", out]
    code, said, err = run_main(distill, capsys, *words)
    assert code == 0 and "M parameters" in said, err
    rows = json.loads(table.read_text())["rows"]
    assert rows[-1]["at 1"] > rows[0]["at 1"] and rows[-1]["seconds"] > 0
    code, said, err = run_main(
        pass_sampler, capsys, "--model", folder, "--method", "draft-model", "--draft-model", out,
        "--prompt", "x = 1", "--max-new-tokens", 20, "--json")
    assert code == 0 and json.loads(said)["method"] == "draft-model", err
    (out / "checkpoint").touch()
    code, _, err = run_main(distill, capsys, *words)
    assert code == 2 and "checkpoint is there: give --resume" in err
    code, _, err = run_main(distill, capsys, *words[:-1], folder / "config.json")
    assert code == 2 and "cannot write" in err


# ---------------------------------------------------- its results

def test_tables_are_made_from_the_files(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "RESULTS", tmp_path)
    row = {"text": "code", "method": "pass", "times as fast": 2.5, "from": 2.4, "to": 2.6}
    about = {"command": "bench.py speed --x", "commit": "abc", "text": ["A machine."]}
    result = about | {"rows": [row, row | {"text": "prose", "times as fast": 2.45}]}
    (tmp_path / "speed.json").write_text(json.dumps(result))
    made = page.filled("<!-- rows speed: method, times as fast; text=code -->\nold\n<!-- end -->\n"
                       "<!-- grid speed: method; text -->\n<!-- end -->\n"
                       "<!-- bare speed: method; text -->\n<!-- end -->\n")
    assert "| pass | 2.50 (2.40 to 2.60) |\n\n<!-- end -->" in made and "old" not in made
    assert "    python bench.py speed --x\n\nA machine. Commit abc.\n\n| method | code |" in made
    assert "| pass | 2.50 (2.40 to 2.60) | 2.45 (2.40 to 2.60) |\n\n" in made
    assert "| --- | --- | --- |\n| pass | 2.50 | 2.45 |\n<!-- end -->" in made
    assert page.filled(made) == made
    with pytest.raises(InputError, match="no row"):
        page.filled("<!-- rows speed: method; text=verse -->\n<!-- end -->")


def test_projection():
    """Passes of any width cost the same: two of them give 2 tokens and the accepted drafts."""
    rows = [{"after tokens": 128, "columns": T, "against one": 1.0} for T in (1, 64)]
    made = page.projection(rows, "demo/model/paper.safetensors").splitlines()
    temperature, L, accepted, of_pass, fused = made[3].strip("| ").split(" | ")
    assert (temperature, L) == ("0.0", "2")
    assert float(of_pass) == pytest.approx(1 + float(accepted) / 2, abs=0.01)
    assert float(fused) == pytest.approx(1 + float(accepted), abs=0.01)
    assert page.cost_of(3, {1: 1.0, 2: 1.0, 4: 2.0}) == 1.5


def test_gguf_has_the_weights(folder, tmp_path, capsys):
    """Every tensor, under llama.cpp's name, the rows of queries and keys in its order."""
    gguf = pytest.importorskip("gguf")
    out = tmp_path / "file.gguf"
    assert run_main(to_gguf, capsys, "--model", folder, "--type", "f16", "--out", out)[0] == 0
    model = Llama.load(folder, torch.float32, packed=False)
    tensors = gguf.GGUFReader(out).tensors
    stored = {tensor.name: torch.tensor(tensor.data).float() for tensor in tensors}
    named = model.named_weights()
    assert len(stored) == len(named)
    for name, weight in named.items():
        found = stored[to_gguf.gguf_name(name)].view(weight.shape)
        if "q_proj" in name or "k_proj" in name:
            half = model.config.head_dim // 2  # row 1 of a head is row E/2 of ours
            assert torch.allclose(found[1], weight[half], atol=1e-3)
            found = found.sort(0).values
            weight = weight.sort(0).values
        torch.testing.assert_close(found, weight, atol=1e-3, rtol=1e-3)


def test_picture_of_a_generation(folder, tmp_path, capsys):
    """It is XML, and has the whole text."""
    out = tmp_path / "out.svg"
    words = ["--model", folder, "--lookahead", "mean", "--prompt", "a < b\n",
             "--max-new-tokens", 30]
    assert run_main(generation, capsys, *words, "--out", out)[0] == 0
    spans = ElementTree.parse(out).iter("{http://www.w3.org/2000/svg}tspan")
    spans = [(span.get("class"), span.text or "") for span in spans]
    assert spans[0] == ("prompt", "a < b")
    text = json.loads(run_main(pass_sampler, capsys, *words, "--json")[1])["text"][0]
    written = "".join(span for kind, span in spans if kind in ("draft", "own"))
    assert written == text.replace("\n", "")
