"""Hostile input: whatever is wrong ends in one clear line and exit code 2 (130 for Ctrl-C), never
in a traceback, a text drawn from numbers that are not finite, or a file that is half written."""
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

import pass_sampler
import train_lookahead
from common import ROOT, run_main
from files import InputError, load_tokenizer, write_tensors
from model import Llama


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "model")


def refused(capsys, *words):
    code, out, err = run_main(pass_sampler, capsys, *words)
    assert code == 2 and out == "", (code, out, err)
    assert err.startswith("error: ") and err.count("\n") == 1, err
    return err


# ---------------------------------------------------- files

def of_one_tensor(dtype, shape, end, stored=b"1234"):
    """The bytes of a file whose header names one tensor, from byte 0 to `end` of what is stored."""
    about = {"a": {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}}
    header = json.dumps(about).encode()
    return struct.pack("<Q", len(header)) + header + stored


LIES = {
    "empty": b"",
    "no header": b"12345678",
    "a header longer than the file": struct.pack("<Q", 2 ** 40) + b"{}",
    "offsets beyond the file": of_one_tensor("F32", [4], 16),
    "a shape that is not its bytes": of_one_tensor("F32", [9], 4),
    "an unknown type": of_one_tensor("F99", [1], 4),
    "a negative shape": of_one_tensor("F32", [-1], 4),
    "more bytes than tensors": of_one_tensor("F32", [1], 4, b"1234" * 1000),
    "a header that is no JSON": struct.pack("<Q", 4) + b"{{{{",
    "tensors of someone else": of_one_tensor("F32", [1], 4),
}


@pytest.mark.parametrize("lie", LIES)
def test_files_that_lie(lie, copy, tmp_path, capsys):
    path = tmp_path / "lookahead.safetensors"
    path.write_bytes(LIES[lie])
    assert "lookahead.safetensors" in refused(capsys, "--model", copy, "--lookahead", path)
    (copy / "model.safetensors").write_bytes(LIES[lie])
    assert "model.safetensors" in refused(capsys, "--model", copy)


def test_random_damage(folder, tmp_path):
    """300 copies of the weights, each with some bytes of the header or the end changed: refused, or
    read as what they now are."""
    whole = (folder / "model.safetensors").read_bytes()
    chance = random.Random(0)
    refusals = 0
    copy = shutil.copytree(folder, tmp_path / "model")
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(chance.randrange(1, 4)):
            value = chance.randrange(256)
            early = chance.random() < 0.8
            damaged[chance.randrange(200 if early else len(whole))] = value
        end = chance.choice([None, None, chance.randrange(len(whole))])
        (copy / "model.safetensors").write_bytes(damaged[:end])
        try:
            assert all(weight.isfinite().all() for weight in Llama.load(copy).parameters())
        except InputError as error:
            assert "\n" not in str(error)
            refusals += 1
    assert refusals > 150


@pytest.mark.parametrize("index", [
    [], {"weight_map": []}, {"weight_map": {"a": 1}},
    {"weight_map": {"a": "missing.safetensors"}}, {}, {"weight_map": {"a": "."}}], ids=str)
def test_bad_indices(index, copy, capsys):
    (copy / "model.safetensors").unlink()
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(capsys, "--model", copy)


@pytest.mark.parametrize("change", [
    {"vocab_size": 10 ** 30}, {"vocab_size": 2 ** 31 - 1, "hidden_size": 2 ** 31 - 1},
    {"num_hidden_layers": 0}, {"num_attention_heads": 0}, {"hidden_size": 17, "head_dim": None},
    {"num_key_value_heads": 3}, {"rope_theta": "big"}, {"rms_norm_eps": float("nan")},
    {"hidden_size": True}, {"rope_scaling": {"rope_type": "linear", "factor": 0}},
    {"eos_token_id": "stop"}], ids=str)
def test_bad_configs(change, copy, capsys):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | change))
    refused(capsys, "--model", copy)


def test_config_nested_without_end(copy, capsys):
    (copy / "config.json").write_text("[" * 100_000)
    assert "config.json" in refused(capsys, "--model", copy)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(number, copy, capsys):
    weights = load_file(copy / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name][3, 4] = number
    save_file(weights, copy / "model.safetensors")
    assert name in refused(capsys, "--model", copy)


DAMAGED = [
    "{", "[]", "1", '{"acceptance": 3}', '{"acceptance": {"x": {"by_rank": []}}}',
    '{"acceptance": {"0": {}}}', '{"acceptance": {"0": {"by_rank": 7}}}']
for ranks in ('[]', '[["a"]]', '[["0.5"]]', "[[]]", "[[NaN]]", "[[-1]]"):
    row = f'{{"expected": 1, "by_position": [1], "by_rank": {ranks}}}'
    DAMAGED.append(f'{{"acceptance": {{"0": {row}}}}}')


@pytest.mark.parametrize("about", DAMAGED)
def test_lookahead_with_damaged_metadata(about, folder, tmp_path, capsys):
    path = tmp_path / "file.safetensors"
    write_tensors({"embeddings": torch.zeros(2, 16)}, path, {"lookahead": about})
    words = ["--model", folder, "--lookahead", path, "--method", "fused"]
    assert "metadata" in refused(capsys, *words)


# -------------------------------------------------- prompts

def test_prompts(folder, tmp_path, capsys):
    prompt = tmp_path / "prompt"
    words = ["--model", folder, "--prompt-file", prompt]
    bad = {b"": "prompt is empty", b"\xff\xfe\xfd": "cannot read the prompt",
           b"x " * 100_000: "shorten the prompt"}
    for content, says in bad.items():
        prompt.write_bytes(content)
        assert says in refused(capsys, *words)
    assert "cannot read the prompt" in refused(capsys, "--model", folder, "--prompt-file", tmp_path)
    prompt.write_bytes(b"a\0b\x01\x7f \r\n")  # strange, but text
    code, out, err = run_main(pass_sampler, capsys, *words, "--max-new-tokens", 3, "--json")
    assert code == 0 and len(json.loads(out)["tokens"][0]) == 3
    tokenizer = load_tokenizer(folder, 320)
    text = "x" * 2000
    while len(tokenizer.encode(text)) >= 512:
        text = text[:-1]
    prompt.write_text(text)  # fills the context but for one slot
    words = [*words, "--json", "--method", "tree", "--tree", "0 1"]
    code, out, err = run_main(pass_sampler, capsys, *words)
    assert code == 0
    result = json.loads(out)
    assert result["stop_reason"][0] in ("context", "stop") and len(result["tokens"][0]) == 1


@pytest.mark.parametrize("words", [
    ["--temperature", "1e-9"], ["--temperature", "1e9"],
    ["--temperature", "1", "--top-k", "999999"], ["--temperature", "1", "--top-p", "1"],
    ["--temperature", "1", "--top-p", "1e-9"]], ids=str)
@pytest.mark.parametrize("method", ["pass", "tree"])
def test_extreme_settings_are_valid(words, method, folder, capsys):
    always = ["--model", folder, "--json", "--max-new-tokens", 9]
    tree = ["--tree", "0 1"] if method == "tree" else []
    code, out, err = run_main(pass_sampler, capsys, *always, "--method", method, *tree, *words)
    assert code == 0, err
    if words[-1] == "1e-9":  # as good as greedy
        greedy = run_main(pass_sampler, capsys, *always)[1]
        assert json.loads(out)["tokens"] == json.loads(greedy)["tokens"]


# --------------------------------- outputs and interruption

def script(name, *words):
    return [sys.executable, str(ROOT / name), *map(str, words)]


def test_full_disk(folder, data, tmp_path):
    """A limit on the size of files stands for a full disk; /dev/full is one."""
    training = script("train_lookahead.py", "--model", folder, "--data", data, "--steps", 1,
                      "--length", 60, "--out", tmp_path / "out")
    command = ["bash", "-c", 'ulimit -f 1; exec "$@"', "bash", *training]
    limited = subprocess.run(command, capture_output=True, text=True)
    assert limited.returncode == 2, limited.stderr
    assert limited.stderr.splitlines()[-1].startswith("error: cannot write"), limited.stderr
    assert list(tmp_path.iterdir()) == []
    command = script("pass_sampler.py", "--model", folder, "--max-new-tokens", 4)
    with open("/dev/full", "w") as full:
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: ")


def test_read_only_folder(folder, data, tmp_path, capsys, monkeypatch):
    # Tests may run as root, who may write everywhere.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    words = ["--model", folder, "--data", data, "--steps", 1, "--out", tmp_path / "out"]
    code, out, err = run_main(train_lookahead, capsys, *words)
    assert code == 2 and err.startswith("error: cannot write") and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["pass_sampler.py", "train_lookahead.py"])
def test_interrupted(name, folder, data, tmp_path):
    """Ctrl-C, once there is something to see: exit code 130, no traceback, no output file."""
    words = ["--model", ROOT / "demo" / "model", "--max-new-tokens", 900]
    if name == "train_lookahead.py":
        words = ["--model", folder, "--data", data, "--out", tmp_path / "out"]
    process = subprocess.Popen(  # nohup would have it ignore Ctrl-C
        script(name, *words), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    if name == "pass_sampler.py":
        process.stdout.read(1)
    else:
        while b"step 0" not in process.stderr.readline():
            assert process.poll() is None
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and b"Traceback" not in err
    assert not (tmp_path / "out").exists()
    if name == "train_lookahead.py":
        saved = (tmp_path / "out.checkpoint").exists()
        assert (b"--resume goes on" if saved else b"nothing is saved yet") in err


def test_what_is_no_regular_file_stays_what_it_is(tmp_path):
    """A symlink's target is written, a pipe is written to; neither is replaced by a file."""
    (tmp_path / "target").touch()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write_tensors({"a": torch.zeros(2)}, tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and load_file(tmp_path / "target")["a"].shape == (2,)
    os.mkfifo(tmp_path / "pipe")
    reader = subprocess.Popen(["cat", tmp_path / "pipe"], stdout=subprocess.PIPE)
    write_tensors({"a": torch.zeros(2)}, tmp_path / "pipe")
    assert len(reader.communicate()[0]) > 8 and (tmp_path / "pipe").is_fifo()
