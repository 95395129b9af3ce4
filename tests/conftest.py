import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
torch.set_num_threads(1)  # the models here are tiny: a second thread only waits

from common import ROOT, save, sentencepiece, tiny


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A tiny random model with a sentencepiece tokenizer (byte fallback), as a Hugging Face folder.
    Tests only read it."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    save(tiny(320, dtype=torch.float32, stop=(2,), context=512), path)
    (path / "tokenizer.model").write_bytes(sentencepiece((ROOT / "LICENSE").read_text()))
    return path


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder of 12 short text files, half of them in a folder below. Tests only read it."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "more").mkdir()
    for i in range(12):
        lines = "".join(f"{j % 7} little lines of {i}\n" for j in range(60))
        (folder / ("more" if i % 2 else "") / f"{i}.txt").write_text(lines)
    return folder
