"""Timing: what a pass costs on this machine, and what each method makes of it.

    python bench.py cost --model DIR                                                    # a pass of T columns against one
    python bench.py speed --model DIR --data PATH .. --suffix .py --lookahead FILE      # methods against plain decoding

Each command prints a Markdown table; --json FILE keeps the numbers. All that a table compares is interleaved in one run, so what
disturbs the machine meets all of it, and every ratio is taken within one prompt. Read `cost` and `speed`.
"""
import argparse
import json
import platform
import statistics
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from model import DTYPES, Cache, InputError, Llama, check_writable, device_named, load_tokenizer, run_script, write_file
from pass_sampler import METHODS, Params, generate, load_draft_model, load_lookahead, measure, run_columns
from train_lookahead import read_data, windows


def parameters(model, read=False):
    """How many the model has, or a pass reads: of the embedding it looks up a few rows, unless that is the output too."""
    plain = Llama(model.config, device="meta")  # shapes only: a packed model has no plain matrices
    return sum(p.numel() for name, p in plain.named_parameters() if not read or name != "embedding" or plain.output is p)


def machine(model):
    """One line that says what was measured on."""
    device = model.embedding.device
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif Path("/proc/cpuinfo").exists():
        name = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), name)
    return (f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, {model.precision}, "
            f"{parameters(model) / 1e6:.1f} M parameters")


# ------------------------------------------------------------------------------------------------------------------- commands

@torch.inference_mode()
def cost(args):
    """The paper's assumption, tested here: a pass is bound by memory traffic, so a few columns more are nearly free."""
    model = load_model(args)
    columns = [1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64]
    contexts = [n for n in (128, 2048) if n + 64 <= model.config.context] or [1]
    big = torch.zeros(64 * 2 ** 20, device=model.embedding.device)
    caches = {context: Cache(model, 1, context + 64) for context in contexts}
    for context, cache in caches.items():
        cache.commit(context)
    seconds = measure({(T, context): partial(run_columns, model, cache, T) for context, cache in caches.items() for T in columns} |
                      {"sum": lambda: big.sum().item()}, tqdm(range(args.rounds + 1), leave=False, disable=None))
    size = parameters(model, read=True) * model.dtype.itemsize
    read, reach = big.numel() * 4 / seconds["sum"] / 1e9, size / seconds[1, contexts[0]] / 1e9
    print(f"{machine(model)}\n\n| columns T | " + " | ".join(f"ms after {n} tokens | against one" for n in contexts) + " |")
    print("|---|" + "---|---|" * len(contexts))
    for T in columns:
        print(f"| {T} |" + "".join(f" {1000 * seconds[T, n]:.1f} | {seconds[T, n] / seconds[1, n]:.2f} |" for n in contexts))
    print(f"\nA pass of one column reads {size / 1e6:.0f} MB of weights, at {reach:.1f} GB/s; summing a large tensor reads at "
          f"{read:.1f} GB/s. Median of {args.rounds} interleaved rounds.")
    return {"machine": machine(model), "seconds": {f"{T} columns after {n}": seconds[T, n] for n in contexts for T in columns},
            "weights_bytes": size, "read_GB_per_second": read}


def speed(args):
    """Whole decodes of held-out prompts by each method, and their speed against plain decoding of the same prompt."""
    methods = {label: label.partition("=")[::2] for label in args.methods}  # "fused=0 1 00" is fused with that tree
    if any(method not in METHODS or method == "autoregressive" or tree and method != "fused" for method, tree in methods.values()):
        raise InputError(f"--methods are {', '.join(m for m in METHODS if m != 'autoregressive')}, or fused=TREE")
    if "draft-model" in methods and not args.draft_model:
        raise InputError("draft-model needs --draft-model DIR")
    settings = [Params(temperature) for temperature in args.temperatures]
    model = load_model(args)
    model.config = replace(model.config, stop_tokens=())  # all texts are equally long, or their times would not compare
    tokenizer = load_tokenizer(args.model, model.config.vocab_size)
    _, held = read_data(tokenizer, args.data, args.suffix)
    if len(held) <= args.prompt_tokens:
        raise InputError(f"the held-out files have {len(held)} tokens, too few for prompts of {args.prompt_tokens}")
    prompts = windows(held, args.prompts, args.prompt_tokens, torch.Generator().manual_seed(args.seed)).tolist()
    lookaheads = [load_lookahead(args.lookahead, model, tokenizer, prompt)
                  for prompt in (prompts if args.lookahead == "mean" else prompts[:1])]
    small = load_draft_model(args.draft_model, model, tokenizer) if args.draft_model else None
    print(f"{machine(model)}; {args.prompts} held-out prompts of {args.prompt_tokens} tokens, {args.new_tokens} new ones\n")
    print("| temperature | method | tokens a pass | tokens/s | times as fast: median (quartiles) |\n|---|---|---|---|---|", flush=True)

    def once(label, i, params, tokens=args.new_tokens):
        method, tree = methods.get(label, (label, ""))
        r = generate(model, [prompts[i]], method, lookaheads[i % len(lookaheads)], params, tokens, args.seed + i, tree=tree or "auto",
                     draft_model=small, length=args.length)
        return {"seconds": (r["seconds"] - r["prefill_seconds"]) / (len(r["tokens"][0]) - 1),  # the first token is prefill's
                "tokens_per_pass": r["tokens_per_pass"], "tree": r.get("tree")}

    labels, results = ["autoregressive", *methods], []
    for label in labels:
        once(label, 0, Params(1), 8)  # warm up
    for params in settings:
        rows = {label: [] for label in labels}
        for i in tqdm(range(len(prompts)), f"temperature {params.temperature:g}", leave=False, disable=None):
            for label in labels[i % len(labels):] + labels[:i % len(labels)]:
                rows[label].append(once(label, i, params))
        for label in labels:
            ratio = [a["seconds"] / b["seconds"] for a, b in zip(rows["autoregressive"], rows[label])]
            low, middle, high = statistics.quantiles(ratio, n=4) if len(ratio) > 1 else ratio * 3
            tree, passes = rows[label][0]["tree"], statistics.mean(r["tokens_per_pass"] for r in rows[label])
            per_second = 1 / statistics.median(r["seconds"] for r in rows[label])
            results.append({"temperature": params.temperature, "method": label, "tree": tree, "ratio": middle, "quartiles": [low, high],
                            "tokens_per_pass": passes, "tokens_per_second": per_second})
            name = f"fused, auto: {tree or 'no tree'}" if label == "fused" else label
            print(f"| {params.temperature:g} | {name} | {passes:.2f} | {per_second:.1f} | {middle:.2f} ({low:.2f} to {high:.2f}) |",
                  flush=True)
    return {"machine": machine(model), "results": results}


# --------------------------------------------------------------------------------------------------------------- command line

def load_model(args):
    return Llama.load(args.model, DTYPES.get(args.dtype), device_named(args.device))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(function):
        sub = commands.add_parser(function.__name__, help=function.__doc__, description=function.__doc__)
        sub.set_defaults(function=function)
        sub.add_argument("--model", type=Path, required=True, help="folder of the model")
        sub.add_argument("--dtype", choices=DTYPES, help="default: as in pass_sampler.py")
        sub.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
        sub.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there too")
        return sub.add_argument
    add = command(cost)
    add("--rounds", type=int, default=15, help="default: %(default)s")
    add = command(speed)
    add("--data", type=Path, nargs="+", required=True, help="files and folders as train_lookahead.py takes them; prompts come from "
        "those that it holds out")
    add("--suffix", default="", help="of the files in folders, such as .py (default: all)")
    add("--lookahead", default="mean", metavar="FILE|unk|mean", help="default: %(default)s")
    add("--methods", nargs="+", default=["pass", "fused"], help="against autoregressive: pass, fused, draft-model, or fused=TREE "
        "(default: pass fused)")
    add("--draft-model", type=Path, metavar="DIR", help="for draft-model")
    add("--length", type=int, default=4, help="drafts a step of draft-model (default: %(default)s)")
    add("--temperatures", type=float, nargs="+", default=[0.0, 0.6, 1.0], help="default: 0 0.6 1")
    add("--prompts", type=int, default=20, help="default: %(default)s")
    add("--prompt-tokens", type=int, default=48, help="default: %(default)s")
    add("--new-tokens", type=int, default=96, help="default: %(default)s")
    add("--seed", type=int, default=1, help="default: %(default)s")
    args = parser.parse_args()
    if args.command == "speed" and min(args.prompts, args.prompt_tokens, args.new_tokens - 1, args.length) < 1 or \
            args.command == "cost" and args.rounds < 1:
        raise InputError("numbers of prompts, tokens, drafts and rounds must be at least 1, that of new tokens 2")
    if args.json:
        check_writable(args.json)
    result = args.function(args)
    if args.json:
        write_file(args.json, lambda temporary: temporary.write_text(json.dumps(result, indent=1)))


if __name__ == "__main__":
    run_script(main)
