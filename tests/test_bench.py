"""bench.py: its tables have the rows that were asked for. Times are not asserted."""
import json

import pytest

import bench
from common import run_main


def test_cost(folder, tmp_path, capsys):
    code, out, err = run_main(bench, capsys, "cost", "--model", folder, "--rounds", 1, "--json", tmp_path / "cost.json")
    assert code == 0 and "| 64 |" in out and "GB/s" in out, err
    assert len(json.loads((tmp_path / "cost.json").read_text())["seconds"]) == 11


def test_speed(folder, data, tmp_path, capsys):
    code, out, err = run_main(bench, capsys, "speed", "--model", folder, "--data", data, "--prompts", 2, "--prompt-tokens", 9,
                              "--new-tokens", 8, "--methods", "pass", "fused", "fused=0 1", "draft-model", "--draft-model", folder,
                              "--temperatures", 0, 0.8, "--json", tmp_path / "speed.json")
    assert code == 0, err
    rows = json.loads((tmp_path / "speed.json").read_text())["results"]
    assert [row["method"] for row in rows] == ["autoregressive", "pass", "fused", "fused=0 1", "draft-model"] * 2
    assert rows[0]["ratio"] == 1 and rows[0]["tokens_per_pass"] == 1 and rows[4]["tokens_per_pass"] > 1
    assert out.count("| 0.8 |") == 5


@pytest.mark.parametrize("words, says", [
    (["--methods", "magic"], "--methods are"), (["--methods", "pass=0 1"], "--methods are"), (["--methods", "draft-model"], "needs --draft"),
    (["--temperatures", "-1"], "temperature must be"), (["--prompts", "0"], "at least 1"), (["--prompt-tokens", "9999"], "too few"),
    (["--json", "/nowhere/file"], "its folder must exist"),
])
def test_bad_input(words, says, folder, data, capsys):
    code, out, err = run_main(bench, capsys, "speed", "--model", folder, "--data", data, *words)
    assert code == 2 and out == "" and says in err and err.count("\n") == 1
