"""On a GPU, in float32: texts and decisions are those of the CPU, and training runs. Skipped where there is none."""
import pytest
import torch

import pass_sampler
import train_lookahead
from common import random_lookahead, run_main
from model import Llama
from pass_sampler import Params, generate, verify, verify_tree

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
PROMPTS = [[5, 6, 7, 8], [9], [10, 11, 12, 13, 14, 15]]


@pytest.mark.parametrize("method, more", [("autoregressive", {}), ("pass", {}), ("draft-model", {}), ("fused", {"tree": "chain:3"}),
                                          ("fused", {"tree": "0 1 00 01 000"})])
def test_greedy_texts_are_those_of_the_cpu(method, more, folder):
    texts = {}
    for device in ("cpu", "cuda"):
        model = Llama.load(folder, torch.float32, device)
        lookahead = random_lookahead(Llama.load(folder, torch.float32), 3)
        run = lambda params: generate(model, PROMPTS, method, lookahead, params, 40, draft_model=model, length=3, **more)["tokens"]
        texts[device] = run(Params(0))
        assert run(Params(1)) == run(Params(1))  # the same seed, the same text
    assert texts["cpu"] == texts["cuda"]


def test_the_rule_decides_as_on_the_cpu():
    g = torch.Generator().manual_seed(0)
    p, q = (torch.rand(500, 4, 9, dtype=torch.float64, generator=g).softmax(-1) for _ in range(2))
    tokens, u = torch.randint(9, (500, 4), generator=g), torch.rand(500, 4, dtype=torch.float64, generator=g)
    for rule, words in ((verify, (p, q[:, 1:], tokens[:, 1:], u)), (verify_tree, ([0, 0, 1], p, q, tokens, u))):
        decide = lambda device: [x.tolist() for x in rule(*(x.to(device) if torch.is_tensor(x) else x for x in words))]
        assert decide("cpu") == decide("cuda")


def test_trains_and_drafts(folder, data, tmp_path, capsys):
    words = ["--model", folder, "--data", data, "--length", 2, "--memory", 3, "--head", 4, "--steps", 20, "--from-model", 0, 1,
             "--texts", 64, "--batch", 32, "--device", "cuda", "--out", tmp_path / "file"]
    code, out, err = run_main(train_lookahead, capsys, *words)
    assert code == 0 and "20 steps" in out, err
    code, out, err = run_main(pass_sampler, capsys, "--model", folder, "--lookahead", tmp_path / "file", "--device", "cuda",
                              "--dtype", "bfloat16", "--compare", "pass", "fused")
    assert code == 0 and "fused takes" in err
