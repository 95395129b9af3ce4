"""What the tests share: tiny models, statistics, planted bugs, and how to run a script."""
import contextlib
import importlib
import io
import json
import sys
import types
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file

from files import run_script

ROOT = Path(__file__).resolve().parent.parent
FIXTURE = Path(__file__).parent / "fixture"
ALPHA = 1e-6  # significance of every statistical test: 30 p-values, one false alarm in 30,000 runs


# ------------------------- the code, as it is or with a bug

# In the order in which they import one another. A bug is planted into a copy of all of them.
MODULES = ["model", "pass_sampler", "beyond.lookahead", "beyond.fused", "beyond.tree",
           "beyond.draft_model", "beyond.own_texts", "train_lookahead", "bench"]


def source(module):
    return ROOT / (module.replace(".", "/") + ".py")


def bundle(modules):
    """The modules by their last names, and `tiny` and `random_lookahead` made of them."""
    code = types.SimpleNamespace(**{name.split(".")[-1]: m for name, m in modules.items()})
    code.tiny = partial(tiny, module=code.model)
    code.random_lookahead = partial(random_lookahead, module=code.lookahead)
    return code


@contextlib.contextmanager
def planted(*patches):
    """The code with bugs, for as long as the context lasts: each patch (old, new) replaces a piece
    of the source that must be there exactly once."""
    texts = {name: source(name).read_text() for name in MODULES}
    for old, new in patches:
        homes = [name for name, text in texts.items() for _ in range(text.count(old))]
        if len(homes) != 1:
            raise ValueError(f"the planted bug does not fit: {old!r} stands {len(homes)} times in "
                             f"the source, not once: adapt tests/mutants.py")
        texts[homes[0]] = texts[homes[0]].replace(old, new)
    real, copies = {name: sys.modules[name] for name in MODULES}, {}
    try:
        for name, text in texts.items():
            copies[name] = sys.modules[name] = types.ModuleType(name)
            copies[name].__file__ = str(source(name))
            exec(compile(text, f"{name}, planted", "exec"), copies[name].__dict__)
        yield bundle(copies)
    finally:
        sys.modules.update(real)


# ---------------------------------------------- tiny models

def tiny(vocab=4, seed=0, dtype=torch.float64, context=64, stop=(), module=None, **changes):
    """A random LLaMA with grouped heads, small enough to enumerate what it may say. module:
    model.py, or a copy with a bug."""
    module = module or sys.modules["model"]
    settings = dict(
        vocab_size=vocab, dim=16, ffn_dim=24, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=6,
        norm_eps=1e-5, rope_theta=100.0, rope={"rope_type": "default"}, context=context, tied=False,
        dtype="float32", stop_tokens=tuple(stop))
    config = module.Config(**settings | changes)
    llama = module.Llama(config, torch.float64).requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for weight in llama.parameters():
        weight.normal_(generator=generator).mul_(0.4) if weight.ndim == 2 else weight.fill_(1)
    llama.embedding.mul_(2.5)
    return llama.to(dtype)  # drawn in float64: the same weights in every type


def whole(llama, tokens):
    """Logits (T,V) of a list of tokens, from one block in a cache of its own."""
    cache = sys.modules["model"].Cache(llama, 1, len(tokens))
    return llama.logits(llama(torch.tensor([tokens]), cache))[0]


def random_lookahead(llama, L, parts=("memory", "head"), seed=5, module=None, keep=None):
    """Random embeddings as large as the model's own, so that drafts are far from the target and
    every branch of the rule is taken; of a memory of 2 slots and a head of rank 8 those that are
    named. keep: so many of the L embeddings."""
    module = module or sys.modules["beyond.lookahead"]
    generator, c = torch.Generator().manual_seed(seed), llama.config

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator).to(llama.embedding)

    embeddings = normal(L, c.dim)[:keep]
    memory = normal(c.n_layers, 2, 2, c.n_kv_heads, c.head_dim)
    head_in, head_out = normal(8, 2 * c.dim), normal(c.dim, 8)
    lookahead = module.LookaheadPlus(embeddings)
    if "memory" in parts:
        lookahead.memory = memory
    if "head" in parts:
        lookahead.head_in, lookahead.head_out = head_in, head_out
    return lookahead


# ----------------------------------------------- statistics


def p_value(texts, exact):
    """Chi-square goodness of fit of sampled texts to {text: probability}; cells expected fewer
    than 5 times are pooled.

    Null hypothesis: the texts are independent draws from `exact`. A text of probability 0 refutes
    it outright.
    """
    counts = dict.fromkeys(exact, 0)
    for text in texts:
        if tuple(text) not in counts:
            return 0.0
        counts[tuple(text)] += 1
    n = len(texts)
    cells = [(counts[t], n * p) for t, p in exact.items() if n * p >= 5]
    rest = [(counts[t], n * p) for t, p in exact.items() if n * p < 5]
    if sum(e for _, e in rest) >= 5:
        cells.append((sum(c for c, _ in rest), sum(e for _, e in rest)))
    statistic = sum((c - e) ** 2 / e for c, e in cells)
    if len(cells) < 2:
        return 1.0
    freedom, half = torch.tensor([(len(cells) - 1) / 2, statistic / 2], dtype=torch.float64)
    return torch.special.gammaincc(freedom, half).item()


def check_power(exact, n, shift):
    """n draws from `exact`, {outcome: probability}, find a deviation of total variation `shift`
    with a power of 99 %, spread over all outcomes, every other one more likely and less, which is
    the hardest to see. Of 300 such samples at most 3 may pass for `exact` at ALPHA, and of 300
    samples from `exact` itself all must."""
    outcomes, weights = list(exact), torch.tensor(list(exact.values()))
    order, generator = weights.argsort(), torch.Generator().manual_seed(0)
    shifted = weights.clone()
    shifted[order[::2]] *= 1 + shift / weights[order[::2]].sum()
    shifted[order[1::2]] *= 1 - shift / weights[order[1::2]].sum()
    passed = []
    for w in (shifted, weights):
        for _ in range(300):
            sample = torch.multinomial(w, n, True, generator=generator).tolist()
            passed.append(p_value([outcomes[i] for i in sample], exact) > ALPHA)
    assert sum(passed[:300]) <= 3 and all(passed[300:])


# ---------------------------------------- files and scripts

def save(model, folder):
    """Write a model as a Hugging Face folder; its rotary scaling must be "default"."""
    c = model.config
    folder.mkdir(exist_ok=True)
    config = dict(
        model_type="llama", vocab_size=c.vocab_size, hidden_size=c.dim, intermediate_size=c.ffn_dim,
        num_hidden_layers=c.n_layers, num_attention_heads=c.n_heads, head_dim=c.head_dim,
        num_key_value_heads=c.n_kv_heads, rms_norm_eps=c.norm_eps, rope_theta=c.rope_theta,
        max_position_embeddings=c.context, tie_word_embeddings=c.tied,
        eos_token_id=list(c.stop_tokens))
    (folder / "config.json").write_text(json.dumps(config))
    weights = {name: tensor.contiguous() for name, tensor in model.named_weights().items()}
    save_file(weights, folder / "model.safetensors")


def sentencepiece(text):
    """The bytes of a tokenizer.model with byte fallback, trained on text."""
    from sentencepiece import SentencePieceTrainer
    proto = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(text.splitlines()), model_writer=proto, model_type="bpe",
        vocab_size=320, byte_fallback=True, hard_vocab_limit=False, minloglevel=2)
    return proto.getvalue()


def run_main(script, capsys, *words):
    """Run a script's main() in this process. Returns exit code, stdout, stderr."""
    sys.argv, code = [script.__file__, *map(str, words)], 0
    try:
        run_script(script.main)
    except SystemExit as end:
        code = end.code
    return code, *capsys.readouterr()


# Last: they are imported under the names that `planted` replaces.
REAL = bundle({name: importlib.import_module(name) for name in MODULES})
