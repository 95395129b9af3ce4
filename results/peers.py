"""How fast are other programs with the same weights? transformers and llama.cpp beside ours.

    python results/peers.py --model DIR --lookahead FILE [--gguf FILE ..]

Each program is a function(params, prompts, new_tokens, seed) that returns tokens, seconds and
prefill_seconds, as `Sampler.generate` does. The first token is the prefill's and is left out.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import support

support.ctrl_c_leaves(__name__)
import itertools
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial

import torch

import bench
from model import load_model
from pass_sampler import Params
from support.errors import DTYPES, InputError, extra, run_script
from support.prompts import read_prompts
from support.tables import print_tables
from support.terminal import add_common, new_parser, user_path


def others(folder: Path, device: torch.device, gguf: list[Path]) -> dict[str, Callable]:
    """{name: function}. gguf: files of demo/recipes/to_gguf.py, for llama.cpp."""
    transformers = extra("transformers")
    found = {}
    for dtype in ("bfloat16",) if device.type == "cuda" else ("bfloat16", "float32"):
        network = load_network(folder, dtype, device)
        ways = {"generate": {}, "prompt lookup": {"prompt_lookup_num_tokens": 10}}
        if device.type == "cuda":
            ways["static cache, compiled"] = {"cache_implementation": "static"}
        for way, options in ways.items():
            name = f"transformers {transformers.__version__}, {dtype}: {way}"
            found[name] = partial(of_transformers, network, options)
    for path in gguf:
        if not path.is_file():
            raise InputError(f"--gguf {path} does not exist; demo/recipes/to_gguf.py makes it")
        llama_cpp = extra("llama_cpp", "make peers")
        try:
            engine = llama_cpp.Llama(str(path), n_ctx=2048, verbose=False,
                                     n_threads=torch.get_num_threads())
        except ValueError as error:
            raise InputError(f"cannot read {path}: {error}") from None
        found[f"llama.cpp, {path.stem}"] = partial(of_llama_cpp, engine)
    return found


def load_network(folder: Path, dtype: str, device: torch.device) -> torch.nn.Module:
    """The model as transformers loads it."""
    transformers = extra("transformers")
    transformers.utils.logging.set_verbosity_error()
    network = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype])
    return network.to(device).eval()


def of_transformers(network, options: dict, params: Params, prompts: list[list[int]],
                    new_tokens: int, seed: int) -> dict:
    """By `generate` of transformers. No token ends a text, unless options set min_new_tokens."""
    ids = torch.tensor(prompts, device=network.device)
    sampling = {"do_sample": False}
    if params.temperature:
        sampling = {"do_sample": True, "temperature": params.temperature, "top_k": params.top_k,
                    "top_p": 1.0}
    torch.manual_seed(seed)
    seconds = {}
    for n in (1, new_tokens):
        start = time.perf_counter()
        texts = network.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, pad_token_id=0,
            repetition_penalty=1.0, **sampling, **{"min_new_tokens": n} | options).tolist()
        seconds[n] = time.perf_counter() - start
    return {"tokens": [text[len(prompts[0]) + 1:] for text in texts],
            "seconds": seconds[new_tokens], "prefill_seconds": seconds[1]}


def of_llama_cpp(engine, params: Params, prompts: list[list[int]], new_tokens: int, seed: int
                 ) -> dict:
    """By llama.cpp, which decodes one row."""
    engine.reset()
    engine.set_seed(seed)
    start = time.perf_counter()
    stream = engine.generate(prompts[0], temp=params.temperature, top_k=params.top_k, top_p=1.0,
                             min_p=0.0, repeat_penalty=1.0)
    next(stream)
    prefill_seconds = time.perf_counter() - start
    tokens = list(itertools.islice(stream, new_tokens - 1))
    return {"tokens": [tokens], "seconds": time.perf_counter() - start,
            "prefill_seconds": prefill_seconds}


def peers(args: Namespace) -> Iterator[str | dict]:
    """How fast others are with the same weights, prompts and settings."""
    if args.new_tokens < 2:
        raise InputError("--new-tokens must be 2 or more: the first is the prefill's")
    model, tokenizer = load_model(args)
    theirs = others(args.model, model.embedding.device, args.gguf or [])
    prompts = read_prompts(args, tokenizer, model.config)
    yield bench.described(args, model, prompts)
    yield ("Times as fast as our plain decoding, whole texts, prefill apart: median over prompts, "
           "with its 95 % interval.")
    for (kind, some), t, k in itertools.product(prompts.items(), args.temperatures, args.top_k):
        params = Params(t, k)
        context = max(map(len, some)) + args.new_tokens
        specs = ["autoregressive", *args.methods]
        functions = {}
        for name, make in bench.contenders(args, model, tokenizer, specs, params, 1):
            functions[name] = partial(make(1, context).generate, stop_tokens=())
        functions |= {name: partial(peer, params) for name, peer in theirs.items()}
        units = [[prompt] for prompt in some]
        seconds = bench.decoded(functions, units, args.seed, args.new_tokens, args.rounds,
                                f"{kind} at {t:g}")
        for name, taken in seconds.items():
            middle, low, high = bench.interval(seconds["autoregressive"] / taken)
            yield {"text": kind, "temperature": t, "top-k": k, "method": name,
                   "tokens/s": 1 / taken.quantile(0.5).item(),
                   "times as fast": middle, "from": low, "to": high}


def main() -> None:
    parser = new_parser(__doc__)
    add_common(parser.add_argument)
    bench.add_options(parser.add_argument, bench.TEXTS + bench.DRAFTED + "top-k rounds no-graph")
    parser.add_argument("--gguf", type=user_path, nargs="+",
                        help="for llama.cpp: files of demo/recipes/to_gguf.py")
    parser.set_defaults(rounds=3)
    args = parser.parse_args()
    bench.check_args(args)
    print_tables(peers(args), args.json)


if __name__ == "__main__":
    run_script(main)
