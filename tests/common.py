"""What the tests share: tiny models, statistics, planted bugs, and how to run a script."""
import contextlib
import importlib.abc
import importlib.util
import inspect
import io
import json
import shlex
import subprocess
import sys
import types
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file

from support.errors import run_script

ROOT = Path(__file__).resolve().parent.parent
FIXTURE = Path(__file__).parent / "fixture"
ALPHA = 1e-6  # significance of every statistical test: 30 p-values, one false alarm in 30,000 runs


# ------------------------- the code, as it is or with a bug

# A bug is planted into a copy of all of these.
MODULES = [f"support.{name}" for name in ("text", "timing", "added_tokens", "tokenizer")]
MODULES += ["model", "pass_sampler", "train_lookahead", "bench", "beyond"]
MODULES += [f"beyond.{path.stem}" for path in (ROOT / "beyond").glob("[a-z]*.py")]


def source(module):
    path = ROOT / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


class Planted(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports modules from {name: source}, in place of their files."""

    def __init__(self, texts):
        self.texts = texts

    def find_spec(self, name, path, target=None):
        if name in self.texts:
            return importlib.util.spec_from_loader(
                name, self, origin=str(source(name)), is_package=source(name).stem == "__init__")

    def exec_module(self, module):
        name = module.__name__
        module.__file__ = str(source(name))
        exec(compile(self.texts[name], f"{name}, planted", "exec"), module.__dict__)


def bundle(modules):
    """The modules by their last names, and `tiny` and `random_lookahead` made of them."""
    code = types.SimpleNamespace(**{name.split(".")[-1]: m for name, m in modules.items()})
    code.tiny = partial(tiny, module=code.model)
    code.random_lookahead = partial(
        random_lookahead, module=code.lookahead, paper=code.pass_sampler)
    return code


def with_patches(patches):
    """{module: source} with bugs: each patch (old, new) replaces a piece of the source that must be
    there exactly once."""
    texts = {name: source(name).read_text(encoding="utf-8") for name in MODULES}
    for old, new in patches:
        homes = [name for name, text in texts.items() for _ in range(text.count(old))]
        if len(homes) != 1:
            raise DoesNotFit(f"{old!r} stands {len(homes)} times in the source, not once")
        texts[homes[0]] = texts[homes[0]].replace(old, new)
    return texts


class DoesNotFit(ValueError):
    """The source has changed where a bug is planted."""


def put(modules):
    """Make these the modules that `import` finds."""
    for name, module in modules.items():
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)


@contextlib.contextmanager
def planted(*patches):
    """The code with bugs, for as long as the context lasts."""
    finder = Planted(with_patches(patches))
    real = {name: sys.modules.pop(name) for name in MODULES}
    sys.meta_path.insert(0, finder)
    try:
        yield bundle({name: importlib.import_module(name) for name in MODULES})
    finally:
        sys.meta_path.remove(finder)
        put(real)


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


def random_lookahead(llama, L, parts=("memory", "head"), seed=5, module=None, paper=None,
                     keep=None):
    """Random embeddings as large as the model's own, so that drafts are far from the target and
    every branch of the rule is taken; of a memory of 2 slots and a head of rank 8 those that are
    named: without either it is the paper's look-ahead. keep: so many of the L embeddings."""
    module = module or sys.modules["beyond.lookahead"]
    paper = paper or sys.modules["pass_sampler"]
    generator, c = torch.Generator().manual_seed(seed), llama.config

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator).to(llama.embedding)

    embeddings = normal(L, c.dim)[:keep]
    if not parts:
        return paper.Lookahead(embeddings)
    memory = normal(c.n_layers, 2, 2, c.n_kv_heads, c.head_dim)
    head_in, head_out = normal(8, 2 * c.dim), normal(c.dim, 8)
    lookahead = module.LookaheadPlus(embeddings)
    if "memory" in parts:
        lookahead.memory = memory
    if "head" in parts:
        lookahead.head_in, lookahead.head_out = head_in, head_out
    return lookahead


def options_of(method, module=None):
    """The names of a method's options in Python."""
    methods = (module or sys.modules["pass_sampler"]).METHODS
    return [*inspect.signature(methods[method].step).parameters][1:]


def options(method, llama, parts=()):
    """What a method needs, by the names of its options: a look-ahead, a tree, a draft model unlike
    the model."""
    names = options_of(method)
    words = {}
    if "lookahead" in names:
        words["lookahead"] = random_lookahead(llama, 3, parts)
    if "tree" in names:
        words["tree"] = "0 1 00 01 000"
    if "draft_model" in names:
        c = llama.config
        words["length"] = 3
        words["draft_model"] = tiny(c.vocab_size, seed=8, dtype=llama.embedding.dtype,
                                    context=c.context, stop=c.stop_tokens)
    return words


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


def command(script, *words):
    """The command line of a script, for a shell."""
    return shlex.join([sys.executable, str(ROOT / script), *map(str, words)])


def run_shells(*lines):
    """Run command lines side by side. Returns (exit code, stdout, stderr) of each."""
    started = []
    for line in lines:
        started.append(subprocess.Popen(line, shell=True, text=True, errors="replace",
                                        stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    outputs = [process.communicate() for process in started]
    return [(process.returncode, *output) for process, output in zip(started, outputs)]


# Last: they are imported under the names that `planted` replaces.
REAL = bundle({name: importlib.import_module(name) for name in MODULES})
