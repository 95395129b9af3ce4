"""On a GPU, in float32: texts are those of the CPU, with and without a graph, rows that end early
too; decisions are those of the CPU; training runs. Skipped where there is no GPU."""
import pytest
import torch
from common import options, run_main

import bench
import pass_sampler
import train_lookahead
from beyond.tree import Shape, verify_tree
from model import Llama
from pass_sampler import METHODS, Params, Sampler, verify

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
PROMPTS = [[5, 6, 7, 8], [9], [10, 11, 12, 13, 14, 15]]


def sampler(folder, method, device, graph=True, params=Params(0), rows=3):
    """A Sampler on random weights; what it needs is made on the CPU, the same for all devices."""
    llama = Llama.load(folder, torch.float32)
    words = options(method, llama, parts=("memory", "head"))
    if "draft_model" in words:
        words["draft_model"].to(device)
        words["draft_model"].frequency = words["draft_model"].frequency.to(device)
    llama = Llama.load(folder, torch.float32, device)
    return Sampler(llama, method, params, rows, 60, graph, **words)


@pytest.mark.parametrize("method", METHODS)
def test_texts_are_those_of_the_cpu(method, folder):
    """Greedy, in float32. Three times: run, recorded, replayed; with prompts of other lengths,
    fewer rows and other seeds in between, none of which records anew."""
    runs = [(PROMPTS, 40), (PROMPTS, 7), ([[3]], 20), (PROMPTS, 40)]
    texts = {}
    for device, graph in (("cpu", True), ("cuda", False), ("cuda", True)):
        s = sampler(folder, method, device, graph)
        results = [s.generate(prompts, n, seed) for seed, (prompts, n) in enumerate(runs)]
        texts[device, graph] = [result["tokens"] for result in results]
        captures = [result["capture_seconds"] > 0 for result in results]
        assert captures == [(device, graph) == ("cuda", True), False, False, False]
    assert texts["cpu", True] == texts["cuda", False] == texts["cuda", True]


@pytest.mark.parametrize("method", METHODS)
def test_a_graph_changes_nothing(method, folder):
    """At temperature 1, and where a row ends early at a stop token."""
    texts = []
    for graph in (False, True):
        s = sampler(folder, method, "cuda", graph, Params(1, 50, 0.9))
        first = s.generate(PROMPTS, 40, 1, stop_tokens=())["tokens"]
        stop = first[1][5]
        again = s.generate(PROMPTS, 40, 1, stop_tokens=(stop,))
        assert again["stop_reason"][1] == "stop" and "length" in again["stop_reason"]
        texts.append((first, again["tokens"], s.generate(PROMPTS, 40, 1, stop_tokens=())["tokens"]))
    assert texts[0] == texts[1] and texts[0][0] == texts[0][2]


def test_the_rule_decides_as_on_the_cpu():
    g = torch.Generator().manual_seed(0)
    p, q = (torch.rand(500, 4, 9, dtype=torch.float64, generator=g).softmax(-1) for _ in range(2))
    tokens = torch.randint(9, (500, 4), generator=g)
    u = torch.rand(500, 4, dtype=torch.float64, generator=g)
    decisions = []
    for device in ("cpu", "cuda"):
        words = [x.to(device) for x in (p, q, tokens, u)]
        chain = verify(words[0], words[1][:, 1:], words[2][:, 1:], words[3])
        tree = verify_tree(Shape("0 1 00", device), *words)
        decisions.append([x.tolist() for x in (*chain, *tree)])
    assert decisions[0] == decisions[1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_trains_and_drafts(dtype, folder, data, tmp_path, capsys):
    words = ["--model", folder, "--data", data, "--length", 2, "--memory", 3, "--head", 4,
             "--steps", 20, "--batch", 32, "--device", "cuda",
             "--dtype", dtype]
    code, out, err = run_main(train_lookahead, capsys, *words, "--out", tmp_path / "file")
    assert code == 0 and "20 steps" in out, err
    for method in ("pass", "fused", "tree"):
        code, out, err = run_main(
            pass_sampler, capsys, "--model", folder, "--lookahead", tmp_path / "file",
            "--device", "cuda", "--dtype", dtype, "--method", method)
        assert code == 0 and err.startswith(f"method {method} "), err


def test_cost_is_that_of_recorded_passes(folder, capsys):
    for more in ([], ["--no-graph"]):
        words = ["cost", "--model", folder, "--device", "cuda", "--rounds", 2, *more]
        code, out, err = run_main(bench, capsys, *words)
        assert code == 0 and out.count("\n| ") >= 12, err
