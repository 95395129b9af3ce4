"""The command line: what it reads, and what it prints. Bad input is in test_hostile.py."""
import json
import shutil
import sys

from common import command, run_main, run_shells, sentencepiece

import pass_sampler


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
    assert err.startswith("method pass on cpu: 30 tokens, ")
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


def test_ways_to_give_a_prompt(folder, tmp_path, capsys):
    """A byte order mark is no text; what is piped in is read, without `-` too."""
    words = ["--model", folder, "--json", "--max-new-tokens", "4"]
    outputs = [call(capsys, *words, "--prompt", "import os")[1]]
    for mark in (b"", b"\xef\xbb\xbf"):
        (tmp_path / "prompt").write_bytes(mark + b"import os")
        outputs.append(call(capsys, *words, "--prompt-file", tmp_path / "prompt")[1])
    line = command("pass_sampler.py", *words)
    for _, out, _ in run_shells(f"printf 'import os' | {line}", f"printf 'import os' | {line} -"):
        outputs.append(out)
    assert len({str(json.loads(output)["tokens"]) for output in outputs}) == 1


def test_streams_that_cannot_be_written(folder, tmp_path):
    """Text that the terminal cannot show does no harm; a reader that leaves ends the program
    quietly; a stream that is closed ends it in one line."""
    (tmp_path / "prompt").write_bytes("\u65e5\u672c \u2014 text".encode())
    line = command("pass_sampler.py", "--model", folder, "--prompt-file", tmp_path / "prompt",
                   "--max-new-tokens", 50, "--temperature", 5)
    shown, left, *closed = run_shells(
        f"PYTHONIOENCODING=cp1252 {line}", f"{line} --samples 3 | head -c 1 > /dev/null",
        f"{line} >&-", f"{command('pass_sampler.py', '--model', folder)} - <&-")
    assert shown[0] == 0 and "50 tokens" in shown[2], shown
    assert left[2].count("\n") <= 1 and "rror" not in left[2]
    for code, _, err in closed:
        assert code == 2 and "Traceback" not in err
