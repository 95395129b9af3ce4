"""Timing and comparing, a command per question. Each prints tables in Markdown.

    python bench.py cost --model DIR                         what does a pass over T columns cost?
    python bench.py acceptance --model DIR --lookahead FILE  how often is a draft accepted?
    python bench.py speed --model DIR --lookahead FILE       how fast is each method?
    python bench.py length --model DIR --lookahead FILE      how many look-ahead tokens, which tree?
    python bench.py memory --model DIR --lookahead FILE      what is added, what is held at most?

--json FILE keeps the numbers and what they were measured on. `make bench` and `make bench-long`
make the tables of results/README.md; results/ has what else is measured. --methods takes
METHOD[:LOOKAHEAD][=SHAPE], such as pass, fused=1, pass:FILE=2, "tree=0 1 00", tree=auto,
draft-model=4. Read `factors`, `compared`.
"""
import support

support.ctrl_c_leaves(__name__)
import ctypes
import itertools
import operator
import platform
import re
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from beyond.draft_model import load_draft_model
from beyond.own_texts import own_texts
from beyond.training import accepted_of_several
from beyond.tree import best_of, choose, table_for
from model import Cache, Config, Llama, has_fbgemm, load_model, pack
from pass_sampler import METHODS, Params, Sampler, load_lookahead
from support.data import PROMPT, Texts
from support.errors import DTYPES, InputError, check_number, check_seed, device_named, run_script
from support.graph import Replay
from support.methods import method_named, method_options
from support.prompts import read_prompts
from support.tables import print_tables
from support.terminal import add_common, new_parser, user_path
from support.text import rows_of
from support.timing import factors, in_columns, interleaved, interval
from support.tokenizer import Tokenizer
from train_lookahead import evaluate

ROOT = Path(__file__).resolve().parent

SIDE_BY_SIDE = 16  # rows, when steps are counted
STEPS = 4  # in one timing
MOST_PER_STEP = 66  # tokens: 64 look-ahead tokens give at most 2 more

# -------------------------------------------- steps and whole texts

class Counted(NamedTuple):
    """What n prompts came to."""
    counts: Tensor  # (n,2): new tokens and steps
    texts: list[list[int]]
    accepted: Tensor  # (drafts,): the share of steps that kept d_1; d_1 and d_2; ..


def count_steps(sampler: Sampler, prompts: list[list[int]], new_tokens: int, seed: int,
                stop_tokens: tuple | None = ()) -> Counted:
    """Decode many prompts side by side. stop_tokens: as in `Sampler.generate`."""
    counts = []
    texts = []
    kept = 0.0
    for i in range(0, len(prompts), sampler.rows):
        some = prompts[i:i + sampler.rows]
        result = sampler.generate(some, new_tokens, seed + i, stop_tokens=stop_tokens)
        counts += zip(map(len, result["tokens"]), result["steps"])
        texts += result["tokens"]
        kept = kept + sum(result["steps"]) * torch.tensor(result["accepted_at_least"])
    counts = torch.tensor(counts)
    return Counted(counts, texts, kept / counts[:, 1].sum())


@torch.inference_mode()
def timed_steps(sampler: Sampler, prompts: list[list[int]], turn: int) -> float:
    """Seconds of a step after prompts, one for each row, in the mean over a few steps."""
    sampler.generator.manual_seed(turn)
    sampler.alive.fill_(1)
    sampler.prefill(prompts)
    for step in range(1 + STEPS):
        if step == 1:  # The one before may have recorded a CUDA graph.
            start = time.perf_counter()
        rows_of(sampler.next_step(), sampler.step.drafts)  # It waits for the device.
    return (time.perf_counter() - start) / STEPS


def decoded(functions: dict[str, Callable], units: list, seed: int, new_tokens: int, rounds: int,
            what: str) -> dict[str, Tensor]:
    """Seconds per token {name: (units,rounds)}, prefill apart, of whole decodes by functions
    {name: f(prompts, new_tokens, seed) -> result}. A unit is prompts that go side by side."""

    def seconds_per_token(function, prompts, turn):
        result = function(prompts, new_tokens, seed + turn)
        seconds = result["seconds"] - result["prefill_seconds"] - result.get("capture_seconds", 0)
        return seconds / sum(map(len, result["tokens"]))

    timed = {name: partial(seconds_per_token, function) for name, function in functions.items()}
    return interleaved(timed, units, rounds, what)


# --------------------------------------------------- what commands share

def machine(model: Llama) -> str:
    """What was measured on, in one line."""
    device = model.embedding.device
    name = platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((x.split(": ")[1] for x in lines if x.startswith("model name")), name)
    return (f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
            f"{model.precision}, {parameters(model) / 1e6:.1f} M parameters")


def parameters(model: Llama) -> int:
    """How many numbers a model has."""
    plain = Llama(model.config, device="meta")  # a packed model has no plain matrices
    return sum(p.numel() for p in plain.parameters())


def described(args: Namespace, model: Llama, prompts: dict) -> str:
    """What was measured, in one line."""
    lengths = [len(prompt) for some in prompts.values() for prompt in some]
    return (f"{machine(model)}. {len(lengths)} prompts of {min(lengths)} to "
            f"{max(lengths)} tokens, {args.new_tokens} new ones. Look-ahead, where none is named: "
            f"{args.lookahead}.")


def contender(args: Namespace, model: Llama, tokenizer: Tokenizer, spec: str, params: Params,
              rows: int) -> tuple[str, Callable[[int, int], Sampler]]:
    """A name, and a function(rows, context) -> Sampler, of METHOD[:FILE][=SHAPE]. "tree=auto" is
    chosen for that many rows."""
    method, given = given_by(args, spec)
    auto = given.get("tree") == "auto"
    if auto:
        del given["tree"]
    options = method_options(METHODS, method, given, model, tokenizer)
    graph = not args.no_graph
    if auto:
        options["tree"] = choose(model, options["lookahead"], params.temperature, rows, graph)
        spec = f"{spec} ({options['tree'] or 'plain decoding'})"
        if options["tree"] is None:  # None is worth its columns.
            method, options = "autoregressive", {}
    return spec, lambda rows, context: Sampler(
        model, method, params, rows, context, graph, **options)


def contenders(args: Namespace, model: Llama, tokenizer: Tokenizer, specs: list[str], *more
               ) -> list[tuple[str, Callable[[int, int], Sampler]]]:
    """A `contender` for each spec, before the work: a bad one is said now."""
    return [contender(args, model, tokenizer, spec, *more) for spec in specs]


def given_by(args: Namespace, spec: str) -> tuple[str, dict]:
    """The method of METHOD[:FILE][=SHAPE] and its words, as a command line would give them."""
    head, _, shape = spec.partition("=")
    name, _, file = head.partition(":")
    method = method_named(METHODS, name)
    given = {}
    for word in ("lookahead", "draft_model"):
        if word in method.flags:
            given[word] = getattr(args, word)
    if file:
        given["lookahead"] = file
    if shape:
        kind = method.flags.get(method.shape, {}).get("type", str)
        try:
            given[method.shape] = kind(shape)
        except ValueError:
            raise InputError(f"{spec!r}: {shape} must be a number") from None
    return name, given


def compared(args: Namespace, model: Llama, tokenizer: Tokenizer, methods: Callable,
             prompts: dict[str, list[list[int]]]) -> Iterator[str | dict]:
    """Paragraphs and rows: for each kind of prompt, number of rows, temperature and top-k, the
    methods that methods(temperature) names, against plain decoding."""
    yield described(args, model, prompts)
    yield (f"Gain = tokens per step / cost of a step; a step of plain decoding costs 1. Tokens per "
           f"step: over all prompts. Cost: just after the prompt of median length, median of "
           f"{args.rounds} interleaved rounds of {STEPS} steps. From, to: 95 % intervals. "
           f"Accepted: the shares of steps that kept 1, 2, .. drafts or more. Decoded: times as "
           f"fast in whole decodes of a few prompts. Same text: the share of greedy texts that "
           f"equal plain decoding's.")
    for kind, rows, t, k in itertools.product(prompts, args.rows, args.temperatures, args.top_k):
        some = prompts[kind]
        context = max(map(len, some)) + max(args.new_tokens, (1 + STEPS) * MOST_PER_STEP)
        specs = ["autoregressive", *methods(t)]
        makers = dict(contenders(args, model, tokenizer, specs, Params(t, k), rows))
        counted = {}
        for name, make in makers.items():
            many = make(min(len(some), SIDE_BY_SIDE), context)
            # A chat's answer ends; what would come after it repeats itself and is easy to guess.
            stop_tokens = None if args.chat else ()
            counted[name] = count_steps(many, some, args.new_tokens, args.seed, stop_tokens)
        samplers = {name: make(rows, context) for name, make in makers.items()}
        steps = {name: partial(timed_steps, sampler) for name, sampler in samplers.items()}
        usual = sorted(some, key=len)[len(some) // 2]
        seconds = interleaved(steps, [[usual] * rows], args.rounds, f"{kind} at {t:g}")
        whole = {}
        if args.decode:
            few = min(args.decode, len(some)) * rows
            units = [(some * rows)[i:i + rows] for i in range(0, few, rows)]
            writers = {name: partial(sampler.generate, stop_tokens=())
                       for name, sampler in samplers.items()}
            whole = decoded(writers, units, args.seed, args.new_tokens, 1, "whole decodes")
        plain = "autoregressive"
        for name in samplers:
            row = {"text": kind, "temperature": t, "top-k": k, "rows": rows, "method": name}
            row["accepted"] = " ".join(f"{share:.2f}" for share in counted[name].accepted.tolist())
            row |= in_columns(factors(counted[name].counts, (seconds[name] / seconds[plain])[0]))
            if args.decode:
                row["decoded"] = (whole[plain] / whole[name]).quantile(0.5).item()
            if t == 0:
                same = sum(map(operator.eq, counted[plain].texts, counted[name].texts))
                row["same text %"] = 100 * same / len(some)
            yield row


# ----------------------------------------------------------- commands

@torch.inference_mode()
def cost(args: Namespace) -> Iterator[str | dict]:
    """What a pass over T columns costs. The paper assumes: little more than over one."""
    model = random_model(args) if args.shape else load_model(args)[0]
    columns = [1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64]
    contexts = [n for n in (128, 2048) if n + 64 <= model.config.context] or [1]
    size = parameters(model) - (0 if model.config.tied else model.embedding.numel())
    read = size * model.dtype.itemsize
    yield (f"{machine(model)}. A pass reads {read / 1e6:.0f} MB of weights. Median and 95 % "
           f"interval of {args.rounds} interleaved rounds. Share of best: of the speed at which "
           f"the sum of as many bytes (at most 1 GiB) is taken, in the same rounds.")
    numbers = torch.ones(min(read, 2**30) // 4, device=model.embedding.device)  # float32

    for n in contexts:
        cache = Cache(model, 1, n + 64)
        cache.commit(n)
        functions = {T: timed_pass(model, cache, T, not args.no_graph) for T in columns}
        functions["best"] = timed(numbers.sum)
        seconds = interleaved(functions, [None], args.rounds, f"after {n} tokens")
        for T in columns:
            middle, low, high = interval(seconds[T] / seconds[1])
            usual = seconds[T].quantile(0.5).item()
            best = numbers.nbytes / seconds["best"].quantile(0.5).item()
            yield {"weights": str(model.dtype)[6:], "after tokens": n, "columns": T,
                   "ms": 1000 * usual, "against one": middle, "from": low, "to": high,
                   "GB/s": read / usual / 1e9, "share of best %": 100 * read / usual / best}


def timed_pass(model: Llama, cache: Cache, T: int, graph: bool) -> Callable:
    """A function(unit, round) -> seconds of a pass over T columns.

    On a GPU the pass is recorded as a CUDA graph and replayed, as `Sampler` does with a step.
    """
    tokens = torch.zeros(1, T, dtype=torch.long, device=model.embedding.device)
    replay = Replay(graph and tokens.is_cuda)

    def run():
        return model.logits(model(tokens, cache))[0, 0, 0]

    replay(run)
    return timed(partial(replay, run))


def timed(function: Callable[[], Tensor]) -> Callable:
    """A function(unit, round) -> seconds of function(), whose result is one number."""
    def seconds(unit, turn):
        start = time.perf_counter()
        function().item()  # waits for a GPU
        return time.perf_counter() - start

    return seconds


SHAPES = {  # LLaMA 2 7B, and TinyLlama 1.1B
    "7b": dict(vocab_size=32000, dim=4096, ffn_dim=11008, n_layers=32, n_heads=32, n_kv_heads=32),
    "1b": dict(vocab_size=32000, dim=2048, ffn_dim=5632, n_layers=22, n_heads=32, n_kv_heads=4),
}


def random_model(args: Namespace) -> Llama:
    """A model of args.shape. What its weights say does not change the time of a pass."""
    shape = SHAPES[args.shape]
    config = Config(**shape, head_dim=shape["dim"] // shape["n_heads"], norm_eps=1e-5,
                    rope_theta=10000.0, rope={"rope_type": "default"}, context=4096, tied=False,
                    dtype="bfloat16", stop_tokens=())
    dtype = DTYPES.get(args.dtype, torch.bfloat16)
    device = device_named(args.device)
    model = Llama(config, dtype, device).requires_grad_(False)
    for weight in model.parameters():
        weight.normal_(0, 0.02)
    if args.dtype in (None, "float16") and has_fbgemm(device):
        pack(model)  # as `Llama.load` does
    return model


def acceptance(args: Namespace) -> Iterator[str | dict]:
    """How often a draft is accepted, on texts that the model writes after the prompts."""
    model, tokenizer = load_model(args)
    lookahead = load_lookahead(args.lookahead, model, tokenizer=tokenizer)
    prompts = read_prompts(args, tokenizer, model.config)
    L = len(lookahead.embeddings)
    shortest = min(len(prompt) for some in prompts.values() for prompt in some)
    if shortest < PROMPT or args.new_tokens <= L:
        raise InputError(f"prompts must have {PROMPT} tokens, new ones be more than the {L} drafts")
    last = model.config.context - PROMPT - args.new_tokens
    if not all(0 <= start <= last for start in args.positions):
        raise InputError(f"--positions must be 0 to {last}")
    yield described(args, model, prompts)
    yield (f"Of prompts the last {PROMPT} tokens. One of k: the probability that one of k "
           f"candidates is accepted; of the chain: accepted drafts per step.")
    for kind, rows in prompts.items():
        ends = [row[-PROMPT:] for row in rows]
        for t in args.temperatures:
            written = own_texts(model, ends, t, args.seed, args.new_tokens, ())
            texts = Texts.of(written, [PROMPT] * len(ends), t, [True] * len(ends))
            for start in args.positions:
                table = evaluate(model, lookahead, texts, start, accepted_of_several)[t]
                for j, ranks in enumerate(table["by_rank"], 1):
                    row = {"text": kind, "temperature": t, "first token at": start, "draft": j}
                    row |= {f"one of {k}": share for k, share in enumerate(ranks, 1)}
                    yield row | {"of the chain": table["expected"]}


def speed(args: Namespace) -> Iterator[str | dict]:
    """How fast each method is, against plain decoding of the same prompts."""
    model, tokenizer = load_model(args)
    prompts = read_prompts(args, tokenizer, model.config)
    yield from compared(args, model, tokenizer, lambda temperature: args.methods, prompts)


def length(args: Namespace) -> Iterator[str | dict]:
    """How many look-ahead tokens, and which tree: the best of so many columns, by the acceptance
    in the file."""
    model, tokenizer = load_model(args)
    lookahead = load_lookahead(args.lookahead, model, tokenizer=tokenizer)

    def methods(temperature):
        lengths = range(1, 1 + len(lookahead.embeddings))
        table = table_for(lookahead, temperature)
        trees = [" ".join(best_of(table, columns)[0]) for columns in args.columns]
        return [*(f"pass={L}" for L in lengths), *(f"fused={L}" for L in lengths),
                *(f"tree={tree}" for tree in dict.fromkeys(trees) if tree), "tree=auto"]

    prompts = read_prompts(args, tokenizer, model.config)
    yield from compared(args, model, tokenizer, methods, prompts)


def memory(args: Namespace) -> Iterator[str | dict]:
    """What a method adds to the model, and what is held at most."""
    model, tokenizer = load_model(args)
    lookahead = load_lookahead(args.lookahead, model, tokenizer=tokenizer)
    context = min(1024, model.config.context)
    check_number("--new-tokens", args.new_tokens, context - 1)
    sizes = {"the model": parameters(model)}
    for name, part in vars(lookahead).items():
        if torch.is_tensor(part):
            sizes[name] = part.numel()
    if "head_out" in sizes:
        rank = lookahead.head_out.shape[1]
        sizes["the head, of all tokens of the vocabulary"] = 2 * model.config.vocab_size * rank
    if args.draft_model:
        sizes["draft model"] = parameters(load_draft_model(args.draft_model, model, tokenizer))
    yield f"{machine(model)}. Two bytes per parameter; look-ahead {args.lookahead}."
    for name, size in sizes.items():
        share = 100 * size / sizes["the model"]
        yield {"part": name, "parameters": size, "MB": size * 2 / 1e6, "%": share}
    yield (f"Measured: what the process (on a GPU, the device) held at most beyond what it held "
           f"before, while {args.new_tokens} tokens were decoded in a context of {context:,}.")
    for name in ["autoregressive", *args.methods]:
        work = partial(decode_once, args, model, tokenizer, name, context)
        yield {"method": name, "MB more": peak_memory(model.embedding.device, work) / 1e6}


def decode_once(args: Namespace, model: Llama, tokenizer: Tokenizer, name: str, context: int
                ) -> None:
    """Make a Sampler of a method, and decode one text."""
    _, make = contender(args, model, tokenizer, name, Params(), 1)
    make(1, context).generate([[1]], args.new_tokens, stop_tokens=())


def peak_memory(device: torch.device, work: Callable) -> int:
    """Bytes held at most while work() runs, beyond what was held before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before

    def held(word):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(word))

    try:
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):
            libc.malloc_trim(0)  # gives back what was freed
        Path("/proc/self/clear_refs").write_text("5")  # the peak is what is held now
        before = held("VmRSS")
        work()
        return held("VmHWM") - before
    except OSError as error:
        raise InputError(f"peak memory cannot be measured here: {error}") from None


# ------------------------------------------------------- command line

OPTIONS = {
    "json": dict(type=user_path, metavar="FILE", help="write the numbers there too"),
    "lookahead": dict(default="mean", metavar="FILE|unk|mean", help="(default: mean, untrained)"),
    "methods": dict(nargs="*", default=["pass", "fused=1"], help="(default: pass fused=1)"),
    "draft-model": dict(type=user_path, metavar="DIR", help="of method draft-model"),
    "prompts": dict(type=user_path, default=ROOT / "demo" / "prompts.json",
                    help="JSON {kind: [text, ..]} (default: demo/prompts.json)"),
    "chat": dict(action="store_true", help="the prompts are messages to a chat model"),
    "kinds": dict(nargs="+", metavar="KIND", help="of the prompts (default: all)"),
    "count": dict(type=int, default=40,
                  help="prompts of each kind, at most (default: %(default)s)"),
    "new-tokens": dict(type=int, default=64, help="(default: %(default)s)"),
    "temperatures": dict(type=float, nargs="+", default=[0.0, 0.6, 1.0], help="(default: 0 .6 1)"),
    "top-k": dict(type=int, nargs="+", default=[0], help="0 is off (default: 0)"),
    "rows": dict(type=int, nargs="+", default=[1], help="prompts side by side (default: 1)"),
    "rounds": dict(type=int, default=30, help="(default: %(default)s)"),
    "decode": dict(type=int, default=4, help="prompts to decode whole, as a check (default: 4)"),
    "no-graph": dict(action="store_true", help="record no CUDA graph"),
    "shape": dict(choices=["1b", "7b"], help="random weights of that size, in place of --model"),
    "positions": dict(type=int, nargs="+", default=[0], help="of first tokens (default: 0)"),
    "columns": dict(type=int, nargs="+", default=[6, 12], help="of a tree (default: 6 12)"),
}
TEXTS = "lookahead prompts chat kinds count new-tokens temperatures "
DECODING = TEXTS + "top-k rounds decode no-graph "
DRAFTED = "methods draft-model "
COMMANDS = {
    cost: "shape rounds no-graph",
    acceptance: TEXTS + "positions",
    speed: DECODING + DRAFTED + "rows",
    length: DECODING + "columns",
    memory: DRAFTED + "lookahead new-tokens no-graph",
}


def add_options(add: Callable, names: str) -> None:
    """Add --json and options of OPTIONS. add: parser.add_argument."""
    for name in ["json", *names.split()]:
        add(f"--{name}", **OPTIONS[name])


def check_args(args: Namespace) -> None:
    """Raise InputError for numbers that are too large, and for methods that could not be made: now,
    and not after half the work."""
    check_seed(args.seed)
    check_number("--decode", getattr(args, "decode", 0), 2**16, 0)
    largest = dict(count=2**16, new_tokens=2**20, rows=2**12, rounds=2**12, samples=2**12,
                   columns=2**10, problems=2**12)
    for name, most in largest.items():
        values = getattr(args, name, 1)
        for value in values if isinstance(values, list) else [values]:
            check_number(f"--{name.replace('_', '-')}", value, most)
    methods = [re.split("[:=]", spec)[0] for spec in args.methods]
    for method in methods:
        method_named(METHODS, method)
    if ("draft-model" in methods) != bool(args.draft_model):
        raise InputError("--draft-model DIR and the method draft-model need each other")
    for t, k in itertools.product(args.temperatures, args.top_k):
        Params(t, k)


def parse() -> Namespace:
    parser = new_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for function, names in COMMANDS.items():
        about = " ".join(function.__doc__.split())
        sub = commands.add_parser(function.__name__, help=about, description=about)
        add_common(sub.add_argument, model_required=function is not cost)
        add_options(sub.add_argument, names)
        sub.set_defaults(function=function)
    parser.set_defaults(rows=[1], methods=[], draft_model=None, temperatures=[0], top_k=[0])
    args = parser.parse_args()
    check_args(args)
    if args.function is cost and (args.model is None) == (args.shape is None):
        raise InputError("give --model DIR or --shape")
    return args


def main() -> None:
    args = parse()
    print_tables(args.function(args), args.json)


if __name__ == "__main__":
    run_script(main)
