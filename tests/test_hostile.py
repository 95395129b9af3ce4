"""Hostile input: whatever is wrong ends in one clear line and exit code 2 (130 for Ctrl-C), never
in a traceback, a text drawn from numbers that are not finite, or a file that is half written."""
import itertools
import json
import os
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import time

import pytest
import torch
from common import ROOT, command, run_main, run_shells
from safetensors.torch import load_file

import pass_sampler
import support
from support import errors
from support.errors import InputError
from support.storage import check_writable, write_tensors, write_text
from support.terminal import has_colour, visible


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "model")


def refused(capsys, *words):
    code, out, err = run_main(pass_sampler, capsys, *words)
    assert code == 2 and out == "", (code, out, err)
    assert err.startswith("error: ") and err.count("\n") == 1, err
    return err


# ------------------------------------------- arguments

@pytest.mark.parametrize("words, says", [
    ("--model nowhere", "no model folder nowhere"),
    ("--temperature nan", "temperature and top-k must be"),
    ("--temperature inf", "temperature and top-k must be"),
    ("--top-k -1", "temperature and top-k must be"), ("--top-p 0", "top-p above 0"),
    ("--top-k 5", "need a --temperature above 0"), (f"--samples {10**8}", "samples must be 1 to"),
    (f"--length {10**10}", "length must be"), (f"--seed {2**64}", "seed must be"),
    ("--seed -1", "seed must be"), ("--device meta", "device 'meta' cannot"),
    ("--device cuda:99", "cannot be used"), ("--device=", "cannot be used"),
    ("--model ~no-such-user/x", "no model folder ~no-such-user"),
    ("--lookahead nowhere", "cannot read nowhere"), ("--lookahead a\0b", "cannot read a"),
    ("--lookahead .", "is a folder"),
    ("--method draft-model --draft-model nowhere", "no model folder nowhere"),
    (f"--method tree --tree {'9' * 5000}", "must be digits, and stand with"),
    ("--method tree --tree 0 --draft-model x", "draft_model has no effect"),
    ("--method autoregressive --length 3", "length has no effect")])
def test_bad_arguments(words, says, folder, capsys):
    assert says in refused(capsys, "--model", folder, *words.split())


# ----------------------------------------------- files

def of_one_tensor(dtype, shape, end):
    """The bytes of a file whose header names one tensor, from byte 0 to `end` of 4 stored ones."""
    about = {"a": {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}}
    header = json.dumps(about).encode()
    return struct.pack("<Q", len(header)) + header + b"1234"


NO_OBJECTS = [b"null", b"[]", b"3", b'"text"', b"", b"[" * 9999]
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
# Empty, a header longer than the file, offsets beyond it, an unknown type, someone else's tensors.
LIES = [b"", struct.pack("<Q", 2 ** 40) + b"{}", of_one_tensor("F32", [4], 16),
        of_one_tensor("F99", [1], 4), of_one_tensor("F32", [1], 4), LFS]


@pytest.mark.parametrize("name, content", [
    *itertools.product(["config.json"], [*NO_OBJECTS, LFS]),
    *itertools.product(["generation_config.json", "tokenizer_config.json"], NO_OBJECTS),
    *itertools.product(["model.safetensors", "lookahead.safetensors"], LIES),
    ("tokenizer.model", b"no tokenizer"), ("tokenizer.model", LFS)])
def test_files_that_lie(name, content, copy, capsys):
    (copy / name).write_bytes(content)
    lookahead = ["--lookahead", copy / name] if name == "lookahead.safetensors" else []
    said = refused(capsys, "--model", copy, *lookahead)
    assert name in said and ("Git LFS pointer" in said) == (content == LFS)


@pytest.mark.parametrize("index", [
    {}, {"weight_map": {"a": 1}}, {"weight_map": {"a": "missing.safetensors"}},
    {"weight_map": {"a": "."}}, {"weight_map": {"a": "nul\0"}}], ids=str)
def test_bad_indices(index, copy, capsys):
    (copy / "model.safetensors").unlink()
    assert "model.safetensors" in refused(capsys, "--model", copy)
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(capsys, "--model", copy)


DAMAGED = [
    "{", "[]", '{"acceptance": 3}', '{"acceptance": {"x": {"by_rank": []}}}',
    '{"acceptance": {"0": {}}}']
for ranks in ("[]", '[["a"]]', "[[]]", "[[NaN]]", "[[-1]]"):
    row = f'{{"expected": 1, "by_position": [1], "by_rank": {ranks}}}'
    DAMAGED.append(f'{{"acceptance": {{"0": {row}}}}}')


@pytest.mark.parametrize("name, tensor, about, says", [
    ("embeddings", torch.zeros(3, 15), "{}", "finite floats of shape (any, 16)"),
    ("embeddings", torch.zeros(3, 16, dtype=torch.long), "{}", "finite floats"),
    ("embeddings", torch.full((3, 16), torch.nan), "{}", "finite floats"),
    ("weights", torch.zeros(3, 16), "{}", "no look-ahead file"),
    ("embeddings", torch.zeros(2, 16), "{}", "fewer than --length 3"),
    ("embeddings", torch.zeros(3, 16), '{"model": "another"}', "trained for another model"),
    *[("embeddings", torch.zeros(3, 16), about, "metadata") for about in DAMAGED]])
def test_bad_lookahead_files(name, tensor, about, says, folder, tmp_path, capsys):
    write_tensors({name: tensor}, tmp_path / "file", {"lookahead": about})
    words = ["--model", folder, "--lookahead", tmp_path / "file", "--length", 3]
    assert says in refused(capsys, *words)


# -------------------------------------------------- prompts

def test_prompts(folder, tmp_path, capsys):
    prompt = tmp_path / "prompt"
    for content, says in ((b"", "prompt is empty"), (b"\xff\xfe\xfd", "cannot read the prompt"),
                          (b"x " * 100_000, "shorten the prompt")):
        prompt.write_bytes(content)
        assert says in refused(capsys, "--model", folder, "--prompt-file", prompt)
    assert "cannot read the prompt" in refused(capsys, "--model", folder, "--prompt-file", tmp_path)


# --------------------------------- outputs and interruption

def test_full_disk(folder, data, tmp_path):
    """A limit on the size of files stands for a full disk; /dev/full is one."""
    training = command("train_lookahead.py", "--model", folder, "--data", data, "--steps", 1,
                       "--length", 60, "--out", tmp_path / "out")
    writing = command("pass_sampler.py", "--model", folder, "--max-new-tokens", 4)
    ended = run_shells(f"ulimit -f 1; {training}", f"{writing} > /dev/full")
    for (code, _, err), says in zip(ended, ("error: cannot write", "error: [Errno 28]")):
        assert code == 2 and "Traceback" not in err, err
        assert err.splitlines()[-1].startswith(says), err
    assert list(tmp_path.iterdir()) == []


def test_only_a_lack_of_memory_is_called_one():
    for said, lack in (("CUDA out of memory. Tried to allocate 9 GiB", True),
                       ("Storage size calculation overflowed", True),
                       ("DefaultCPUAllocator: can't allocate memory", True),
                       ("CUBLAS_STATUS_ALLOC_FAILED", True),
                       ("an illegal memory access was encountered", False),
                       ("refers to a single memory location", False)):
        assert bool(errors.MEMORY.search(said)) == lack


def test_read_only_folder(tmp_path, monkeypatch):
    # Tests may run as root, who may write everywhere.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(InputError, match="cannot write"):
        check_writable(tmp_path / "out")


def test_interrupted(folder, data, tmp_path):
    """Ctrl-C, once there is something to see: exit code 130, no traceback, no output file."""
    training = command("train_lookahead.py", "--model", folder, "--data", data, "--out",
                       tmp_path / "out")
    process = subprocess.Popen(  # nohup would have it ignore Ctrl-C
        shlex.split(training), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    while b"step 0" not in process.stderr.readline():
        assert process.poll() is None
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and b"Traceback" not in err
    assert not (tmp_path / "out").exists()
    saved = (tmp_path / "out.checkpoint").exists()
    assert (b"--resume goes on" if saved else b"nothing is saved yet") in err


@pytest.mark.parametrize("name", ["pass_sampler.py", "demo/steps.py", "-m beyond.own_texts"])
@pytest.mark.parametrize("imported", [" numpy", " torch"])
def test_interrupted_while_torch_is_imported(name, imported):
    """No traceback either, and the same exit code; -X importtime says what was just imported."""
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", *name.split(), "--help"], cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    while imported.encode() not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and b"Traceback" not in err


def test_ctrl_c_is_left_alone_where_a_script_is_imported():
    assert signal.getsignal(signal.SIGINT) is not support.leave


def test_a_file_keeps_its_mode_and_what_stands_beside_it(tmp_path):
    """A new file has the mode that any new file has."""
    path, theirs = tmp_path / "F.json", tmp_path / "F.json.tmp"
    (tmp_path / "ordinary").touch()
    write_text(path, "old")
    assert path.stat().st_mode == (tmp_path / "ordinary").stat().st_mode
    theirs.write_text("somebody else's")
    path.chmod(0o640)
    write_text(path, "ü")
    assert path.read_bytes() == "ü".encode() and path.stat().st_mode & 0o777 == 0o640
    assert theirs.read_text() == "somebody else's" and len([*tmp_path.iterdir()]) == 3


def test_control_characters_are_shown_and_not_obeyed():
    assert visible("a\tb\n\x1b[31m\x7f\x9b") == "a\tb\n\u241b[31m\ufffd\ufffd"


@pytest.mark.parametrize("no_color, term, colour", [
    ("", "xterm", True), ("1", "xterm", False), ("", "dumb", False)])
def test_conventions_of_terminals(no_color, term, colour, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setenv("TERM", term)
    assert has_colour() == colour


def test_a_prompt_that_is_piped_in_late(folder, capsys):
    """It is the prompt, and no other is; nothing piped in is refused."""
    words = ["--model", folder, "--max-new-tokens", 4, "--json"]
    line = command("pass_sampler.py", *words)
    (_, late, _), (code, _, err) = run_shells(
        f"(sleep 1; printf ab) | {line}", f"true | {line}")
    _, given, _ = run_main(pass_sampler, capsys, *words, "--prompt", "ab")
    assert json.loads(late)["tokens"] == json.loads(given)["tokens"]
    assert code == 2 and "the prompt is empty" in err


def test_the_home_folder(folder, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    words = [f"--model=~/{folder.name}", "--prompt", "a", "--max-new-tokens", 2]
    assert run_main(pass_sampler, capsys, *words)[0] == 0


def test_what_is_no_regular_file_stays_what_it_is(tmp_path):
    """A symlink's target is written, a pipe is written to; neither is replaced by a file."""
    (tmp_path / "target").touch()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write_tensors({"a": torch.zeros(2)}, tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and load_file(tmp_path / "target")["a"].shape == (2,)
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    for write in (check_writable, lambda path: write_text(path, "a")):
        with pytest.raises(InputError, match="cannot write"):
            write(tmp_path / "circle")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "pipe.tmp").touch()  # somebody else's
    reader = subprocess.Popen(["cat", tmp_path / "pipe"], stdout=subprocess.PIPE)
    write_tensors({"a": torch.zeros(2)}, tmp_path / "pipe")
    assert len(reader.communicate()[0]) > 8 and (tmp_path / "pipe").is_fifo()
    assert (tmp_path / "pipe.tmp").exists()
