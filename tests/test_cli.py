"""The command line: what it prints, and that bad input ends in one clear line and exit code 2."""
import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

import pass_sampler
from common import ROOT, run_main, save, sentencepiece, tiny


def call(capsys, *arguments):
    return run_main(pass_sampler, capsys, *arguments)


def test_json_is_one_object(folder, capsys):
    code, out, err = call(capsys, "--model", folder, "--prompt", "import", "--json", "--samples", 2,
                          "--temperature", 1, "--max-new-tokens", 9, "--length", 3)
    result = json.loads(out)
    assert code == 0 and err == ""
    assert [len(row) for row in result["tokens"]] == [9, 9]
    assert result["stop_reason"] == ["length"] * 2 and len(result["text"]) == 2
    assert 0 < result["prefill_seconds"] < result["seconds"] and result["capture_seconds"] == 0


def test_stream_and_summary(folder, capsys):
    """The streamed text is the text; a pipe has no colour; the figures go to stderr, one line."""
    words = ["--model", folder, "--prompt", "import", "--max-new-tokens", 30, "--temperature", 1]
    _, out, err = call(capsys, *words)
    _, as_json, _ = call(capsys, *words, "--json")
    assert out == json.loads(as_json)["text"][0] + "\n" and "\033" not in out
    assert err.startswith("pass on cpu: 30 tokens, ")
    assert "tokens per pass, at least 1, 2, .. drafts accepted in" in err
    assert err.count("\n") == 1
    _, out, err = call(capsys, *words, "--lookahead", "unk", "--samples", 2)
    assert "\n--- sample 2\n" in out


def test_all_methods(folder, tmp_path, capsys):
    """Greedy in float64: all methods write the same; the draft model must share the tokenizer."""
    words = ["--model", folder, "--dtype", "float64", "--max-new-tokens", 12, "--json"]
    texts = set()
    methods = [["autoregressive"], ["pass"], ["fused", "--length", 2], ["tree", "--tree", "0 1 00"],
               ["draft-model", "--draft-model", folder, "--length", 3]]
    for more in methods:
        code, out, err = call(capsys, *words, "--method", *more)
        assert code == 0, err
        texts.add(str(json.loads(out)["tokens"]))
    assert len(texts) == 1
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    (other / "tokenizer.model").write_bytes(sentencepiece(sentencepiece.__doc__ * 9))
    code, _, err = call(capsys, *words, "--method", "draft-model", "--draft-model", other)
    assert code == 2 and "is not that of the model" in err


def test_on_a_terminal(folder, capsys, monkeypatch):
    """The prompt stands before the text, accepted drafts are green, and a legend says so."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    words = ["--model", folder, "--prompt", "import", "--max-new-tokens", 40, "--temperature", 1]
    _, out, err = call(capsys, *words)
    assert "\033[32m" in out and out.startswith("\033[2mimport\033[0m")
    assert "green: accepted drafts" in err
    monkeypatch.setenv("NO_COLOR", "1")
    _, plain, err = call(capsys, *words)
    for code in ("\033[32m", "\033[2m", "\033[0m"):
        out = out.replace(code, "")
    assert plain == out and "green" not in err


def test_prompt_from_file_and_standard_input(folder, tmp_path, capsys):
    (tmp_path / "prompt.txt").write_text("import sys\n")
    words = ["--model", folder, "--json", "--max-new-tokens", "4"]
    _, from_file, _ = call(capsys, *words, "--prompt-file", tmp_path / "prompt.txt")
    command = [sys.executable, ROOT / "pass_sampler.py", *words, "-"]
    from_stdin = subprocess.run(command, input=b"import sys\n", capture_output=True, check=True)
    assert json.loads(from_file)["tokens"] == json.loads(from_stdin.stdout)["tokens"]


def test_exit_code_of_the_process_and_closed_pipe(folder):
    script = (f"{sys.executable} {ROOT / 'pass_sampler.py'} --model {folder} --samples 3 "
              "--max-new-tokens 50")

    def shell(command):
        return subprocess.run(command, shell=True, capture_output=True, text=True)

    bad = shell(f"{script} --temperature -1")
    assert bad.returncode == 2 and bad.stdout == ""
    assert bad.stderr.startswith("error: temperature") and bad.stderr.count("\n") == 1
    closed = shell(f"{script} | head -c 1 > /dev/null")
    assert closed.stderr.count("\n") <= 1 and "rror" not in closed.stderr


FOLDER = object()  # stands for the fixture


@pytest.mark.parametrize("arguments, says", [
    (["--model", "nowhere"], "no model folder nowhere"),
    (["--prompt", ""], "prompt is empty"),
    (["--prompt-file", "nowhere.txt"], "cannot read the prompt"),
    (["--prompt", "long " * 1000], "shorten the prompt"),
    (["--temperature", "-0.1"], "temperature and top-k must be"),
    (["--temperature", "nan"], "temperature and top-k must be"),
    (["--temperature", "inf"], "temperature and top-k must be"),
    (["--top-k", "-1"], "temperature and top-k must be"),
    (["--top-p", "0"], "top-p above 0"),
    (["--top-p", "1.5"], "top-p above 0"),
    (["--max-new-tokens", "0"], "at least one"),
    (["--samples", "0"], "samples must be 1 to"),
    (["--method", "draft-model"], "needs a draft_model"),
    (["--method", "draft-model", "--draft-model", "nowhere"], "no model folder nowhere"),
    (["--method", "draft-model", "--draft-model", FOLDER, "--length", "0"], "must be 1 to"),
    (["--method", "tree", "--tree", "9" * 5000], "must be digits, and stand with"),
    (["--method", "tree", "--tree", "00"], "must be digits, and stand with"),
    (["--method", "tree", "--tree", "0", "--draft-model", FOLDER], "draft_model has no effect"),
    (["--tree", "0"], "tree has no effect on method pass"),
    (["--draft-model", FOLDER], "draft_model has no effect on method pass"),
    (["--method", "autoregressive", "--lookahead", "nowhere"], "lookahead has no effect"),
    (["--method", "autoregressive", "--length", "3"], "length has no effect"),
    (["--lookahead", ""], "is a folder"),
    (["--length", "0"], "length must be"),
    (["--device", "warp"], "device 'warp' cannot be used"),
    (["--device", "cuda:99"], "device 'cuda:99' cannot be used"),
    (["--lookahead", "nowhere.safetensors"], "cannot read nowhere.safetensors"),
    (["--lookahead", "tests"], "is a folder"),
    (["--method", "magic"], "invalid choice: 'magic'"),
    (["--dtype", "int8"], "invalid choice: 'int8'"),
])
def test_bad_arguments(arguments, says, folder, capsys):
    words = [folder if argument is FOLDER else argument for argument in arguments]
    if "--model" not in arguments:
        words = ["--model", folder, *words]
    code, out, err = call(capsys, *words)
    assert code == 2 and out == "" and says in err
    assert "invalid choice" in says or (err.startswith("error: ") and err.count("\n") == 1)


@pytest.mark.parametrize("tensors, says", [
    ({"embeddings": torch.zeros(3, 15)}, "finite floats of shape [3, 16]"),
    ({"embeddings": torch.zeros(3, 16, dtype=torch.long)}, "finite floats"),
    ({"weights": torch.zeros(3, 16)}, "no look-ahead file"),
    ({"embeddings": torch.zeros(2, 16)}, "fewer than --length 3"),
    ({"embeddings": torch.full((3, 16), torch.nan)}, "finite floats"),
])
def test_bad_lookahead_files(tensors, says, folder, tmp_path, capsys):
    path = tmp_path / "lookahead.safetensors"
    save_file(tensors, path)
    code, out, err = call(capsys, "--model", folder, "--lookahead", path, "--length", 3)
    assert code == 2 and out == "" and says in err and err.count("\n") == 1


def test_lookahead_file_is_used(folder, tmp_path, capsys):
    path = tmp_path / "lookahead.safetensors"
    save_file({"embeddings": torch.randn(3, 16)}, path)
    words = ["--model", folder, "--lookahead", path, "--json", "--max-new-tokens", 9]
    code, out, _ = call(capsys, *words)
    assert code == 0 and len(json.loads(out)["accepted_at_least"]) == 3


@pytest.mark.parametrize("file, content, says", [
    ("tokenizer.model", None, "neither tokenizer.model nor tokenizer.json"),
    ("tokenizer.model", b"not a tokenizer", "tokenizer.model"),
    ("tokenizer.json", b"{}", "tokenizer.json"),
    ("config.json", b"{", "config.json"),
    ("config.json", b"[]", "one JSON object"),
    ("model.safetensors", b"", "model.safetensors"),
])
def test_bad_model_folders(file, content, says, folder, tmp_path, capsys):
    if file == "tokenizer.json":
        pytest.importorskip("tokenizers")
    for name in ("config.json", "model.safetensors", "tokenizer.model"):
        if not file.startswith(name.split(".")[0]):
            (tmp_path / name).write_bytes((folder / name).read_bytes())
    if content is not None:
        (tmp_path / file).write_bytes(content)
    code, out, err = call(capsys, "--model", tmp_path)
    assert code == 2 and out == "" and says in err
    assert err.startswith("error: ") and err.count("\n") == 1


def test_tokenizer_of_another_model(folder, tmp_path, capsys):
    save(tiny(100, dtype=torch.float32), tmp_path / "small")
    (tmp_path / "small" / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    code, _, err = call(capsys, "--model", tmp_path / "small")
    assert code == 2 and "vocabulary" in err
