import io
import sys
from pathlib import Path

import pytest
import torch

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]
torch.set_num_threads(1)  # the models here are tiny: a second thread only waits

from common import save, tiny  # noqa: E402


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A tiny random model with a sentencepiece tokenizer (byte fallback), as a Hugging Face folder. Tests only read it."""
    import sentencepiece
    text, proto = Path(__file__).read_text(), io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.splitlines()), model_writer=proto, model_type="bpe", vocab_size=320, byte_fallback=True,
        hard_vocab_limit=False, minloglevel=2)
    path = tmp_path_factory.mktemp("models") / "tiny"
    save(tiny(320, dtype=torch.float32, stop=(2,), context=512), path)
    (path / "tokenizer.model").write_bytes(proto.getvalue())
    return path
