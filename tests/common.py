"""What the tests share: tiny models, the exact distribution that a sampler must follow, chi-square, and planted bugs."""
import io
import json
import sys
import types
from dataclasses import astuple
from functools import partial
from pathlib import Path

import naive
import torch
from safetensors.torch import save_file

import model
import pass_sampler
import train_lookahead
from model import Cache, run_script

ROOT = Path(__file__).resolve().parent.parent
FIXTURE = Path(__file__).parent / "fixture"
ALPHA = 1e-6  # significance of every statistical test. 35 p-values: a false alarm in one of 25,000 runs with fresh seeds


def tiny(vocab=4, seed=0, dtype=torch.float64, context=64, stop=(), module=model, **changes):
    """A random LLaMA with grouped heads, small enough to enumerate what it may say. module: model.py, or a copy with a bug."""
    config = module.Config(**{**dict(vocab_size=vocab, dim=16, ffn_dim=24, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=6,
                                     norm_eps=1e-5, rope_theta=100.0, rope={"rope_type": "default"}, context=context, tied=False,
                                     dtype="float32", stop_tokens=tuple(stop)), **changes})
    llama = module.Llama(config, torch.float64).requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for weight in llama.parameters():
        weight.normal_(generator=generator).mul_(0.4) if weight.ndim == 2 else weight.fill_(1)
    llama.embedding.mul_(2.5)
    return llama.to(dtype)  # drawn in float64: the same weights in every type


def whole(model, tokens):
    """Logits (T,V) of a list of tokens, from one block in a cache of its own."""
    h = model(torch.tensor([tokens]), torch.arange(len(tokens))[None], Cache(model, 1, len(tokens)))
    return model.logits(h)[0]


def exact_texts(model, prompt, params, n):
    """{text: probability} of all texts of n tokens, or fewer with a stop token at the end, straight from the chain rule."""
    texts = {(): 1.0}
    for _ in range(n):
        longer = {}
        for text, probability in texts.items():
            if text and text[-1] in model.config.stop_tokens:
                longer[text] = probability
                continue
            for token, p in enumerate(naive.probs(whole(model, prompt + list(text))[-1].tolist(), *astuple(params))):
                if p:
                    longer[text + (token,)] = probability * p
        texts = longer
    return texts


def p_value(texts, exact):
    """Chi-square goodness of fit of sampled texts to {text: probability}; cells expected fewer than 5 times are pooled.

    Null hypothesis: the texts are independent draws from `exact`. A text of probability 0 refutes it outright.
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
    return torch.special.gammaincc(torch.tensor((len(cells) - 1) / 2).double(), torch.tensor(statistic / 2).double()).item()


def check_power(exact, n, shift):
    """n draws from `exact`, {outcome: probability}, find a deviation of total variation `shift` with a power of 99 %, spread over all
    outcomes, every other one more likely and less, which is the hardest to see. Of 300 such samples at most 3 may pass for
    `exact` at ALPHA, and of 300 samples from `exact` itself all must."""
    outcomes, weights = list(exact), torch.tensor(list(exact.values()))
    order, generator = weights.argsort(), torch.Generator().manual_seed(0)
    shifted = weights.clone()
    shifted[order[::2]] *= 1 + shift / weights[order[::2]].sum()
    shifted[order[1::2]] *= 1 - shift / weights[order[1::2]].sum()
    passed = [p_value([outcomes[i] for i in torch.multinomial(w, n, True, generator=generator).tolist()], exact) > ALPHA
              for w in (shifted, weights) for _ in range(300)]
    assert sum(passed[:300]) <= 3 and all(passed[300:])


def plant(module, *patches):
    """A copy of a module with a bug: each patch (old, new) replaces a piece of its source that must be there exactly once."""
    source = Path(module.__file__).read_text()
    for old, new in patches:
        if source.count(old) != 1:
            raise ValueError(f"the planted bug no longer fits the source: {old!r} stands there {source.count(old)} times, and must "
                             "once: adapt tests/mutants.py")
        source = source.replace(old, new)
    mutant = types.ModuleType(module.__name__)
    mutant.__file__ = module.__file__
    exec(compile(source, f"{module.__name__} with a planted bug", "exec"), mutant.__dict__)
    return mutant


def planted(**patches):
    """model.py, pass_sampler.py and train_lookahead.py with bugs, {module: [(old, new), ..]}, each importing the others of its kind;
    also `tiny` and `random_lookahead` made of them. Without patches: the code as it is."""
    real = {module.__name__: module for module in (model, pass_sampler, train_lookahead)}
    code, bugs = types.SimpleNamespace(), bool(patches)
    try:
        for name, module in real.items():
            sys.modules[name] = plant(module, *patches.pop(name, ())) if bugs else module
            setattr(code, name, sys.modules[name])
    finally:
        sys.modules.update(real)
    assert not patches, f"no such module: {list(patches)}"
    code.tiny = partial(tiny, module=code.model)
    code.random_lookahead = partial(random_lookahead, module=code.pass_sampler)
    return code


def random_lookahead(llama, L, parts=("memory", "head"), seed=5, module=pass_sampler):
    """Random embeddings as large as the model's own, so that drafts are far from the target and every branch of the rule is taken;
    of a memory of 2 slots and a head of rank 8 those that are named."""
    g, c = torch.Generator().manual_seed(seed), llama.config
    normal = lambda *shape: torch.randn(*shape, dtype=llama.embedding.dtype, generator=g)
    lookahead = module.Lookahead(normal(L, c.dim))
    if "memory" in parts:
        lookahead.memory = normal(c.n_layers, 2, 2, c.n_kv_heads, c.head_dim)
    if "head" in parts:
        lookahead.head_in, lookahead.head_out = normal(8, 2 * c.dim), normal(c.dim, 8)
    return lookahead


CODE = planted()


def ends(n):
    """Uniforms from each n-th of [0, 1), (n,): a little after the beginnings, and a little before the ends."""
    return [(torch.arange(n, dtype=torch.float64) + at) / n for at in (1e-9, 1 - 1e-9)]


def save(model, folder):
    """Write a model as a Hugging Face folder; its rotary scaling must be "default"."""
    c = model.config
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(
        model_type="llama", vocab_size=c.vocab_size, hidden_size=c.dim, intermediate_size=c.ffn_dim, num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads, num_key_value_heads=c.n_kv_heads, head_dim=c.head_dim, rms_norm_eps=c.norm_eps,
        rope_theta=c.rope_theta, max_position_embeddings=c.context, tie_word_embeddings=c.tied, eos_token_id=list(c.stop_tokens))))
    save_file({name: tensor.contiguous() for name, tensor in model.named_weights().items()}, folder / "model.safetensors")


def sentencepiece(text):
    """The bytes of a tokenizer.model with byte fallback, trained on text."""
    from sentencepiece import SentencePieceTrainer
    proto = io.BytesIO()
    SentencePieceTrainer.train(sentence_iterator=iter(text.splitlines()), model_writer=proto, model_type="bpe", vocab_size=320,
                               byte_fallback=True, hard_vocab_limit=False, minloglevel=2)
    return proto.getvalue()


def run_main(script, capsys, *words):
    """Run a script's main() in this process with the command line `words`. Returns exit code, stdout, stderr."""
    sys.argv, code = [script.__file__, *map(str, words)], 0
    try:
        run_script(script.main)
    except SystemExit as end:
        code = end.code
    return code, *capsys.readouterr()
