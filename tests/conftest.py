import sys
from pathlib import Path

import pytest
import torch

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]
torch.set_num_threads(1)  # the models here are tiny: a second thread only waits

from common import save, sentencepiece, tiny  # noqa: E402


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A tiny random model with a sentencepiece tokenizer (byte fallback), as a Hugging Face folder. Tests only read it."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    save(tiny(320, dtype=torch.float32, stop=(2,), context=512), path)
    (path / "tokenizer.model").write_bytes(sentencepiece(Path(__file__).read_text()))
    return path
