"""demo/steps.py, the walk: it is PaSS, and what it shows is what happened."""

import pytest
import torch
from common import ROOT, run_main

from demo import grids, steps
from model import Llama
from pass_sampler import Params, generate, load_lookahead
from results import step

DEMO = ROOT / "demo" / "model"


@pytest.mark.parametrize("temperature", [0, 1])
@torch.inference_mode()
def test_the_walk_writes_what_pass_writes(temperature):
    """From the same uniforms, token by token."""
    model = Llama.load(DEMO)
    lookahead = load_lookahead(DEMO / "paper.safetensors", model)
    prompt = [1, 300, 400, 500]
    text = []
    for h in steps.walk(model, lookahead, Params(temperature), prompt, 40, 5):
        kept = [draft.token for draft in h.drafts if draft.verdict == "accepted"]
        text += [h.x, *kept, h.last]
    assert len(text) > 85
    expected = generate(model, [prompt], "pass", Params(temperature), len(text), 5,
                        lookahead=lookahead, stop_tokens=[])["tokens"][0]
    assert text == expected


@pytest.mark.parametrize("brief", [(), ("--brief",)])
def test_what_is_shown_is_consistent(brief, capsys):
    """A draft is accepted where u < p/q, and those that follow a rejection are not judged."""
    code, out, err = run_main(steps, capsys, "--steps", 20, "--seed", 20, *brief)
    assert code == 0 and ("at position" in out) == (not brief), err
    verdicts = [line.split() for line in out.splitlines()
                if line.startswith("d_") and line.endswith(("accepted", "rejected"))]
    assert len(verdicts) > 20 and {words[-1] for words in verdicts} == {"accepted", "rejected"}
    for *_, quotient, u, verdict in verdicts:
        assert (float(u) < float(quotient) + 0.005) == (verdict == "accepted")


@pytest.mark.parametrize("words, says", [
    (["--lookahead", DEMO / "lookahead.safetensors"], "more than the paper's embeddings"),
    (["--lookahead", "nowhere"], "cannot read nowhere"), (["--steps", 0], "steps must be 1 to"),
    (["--temperature", -1], "temperature and top-k"),
    (["--model", "nowhere"], "no model folder")])
def test_bad_input(words, says, capsys):
    code, out, err = run_main(steps, capsys, *words)
    assert code == 2 and says in err and err.count("\n") == 1 and out == ""


def test_grids(capsys):
    """A draft sees the path to it; a group sees what its node sees, and itself."""
    code, out, err = run_main(grids, capsys, "fused=1")
    assert code == 0, err
    rows = [line.split() for line in out.splitlines() if "#" in line]
    assert [row[2:7] for row in rows] == [
        list("##..."), list("###.."), list("##.#."), list("###.#")]


def test_the_picture_of_a_step(tmp_path, capsys):
    out = tmp_path / "step.svg"
    assert run_main(step, capsys, "--out", out, "--seed", 20)[0] == 0
    assert "accepted" in out.read_text() and out.read_text().startswith("<svg")
