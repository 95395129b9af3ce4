"""Tokens per step and gain by the six tasks of Spec-Bench (Xia et al. 2024, arXiv 2401.07851).

    python results/spec_bench.py --questions question.jsonl --model DIR --lookahead FILE

question.jsonl is in github.com/hemingkx/Spec-Bench, below data/spec_bench. Of each question the
first turn is asked, in the model's own chat template. --prompt-lookup also measures prompt lookup
in transformers, against the plain decoding of transformers.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import support

support.ctrl_c_leaves(__name__)
import json
from argparse import Namespace
from collections.abc import Iterator

import torch

import bench
from model import load_model
from pass_sampler import Params
from results.peers import load_network, of_transformers
from support.chat import message_encoder
from support.errors import InputError, check_number, run_script
from support.prompts import check_room
from support.tables import print_tables
from support.terminal import add_common, new_parser, user_path

# Spec-Bench's own names. All other categories are those of MT-bench, a conversation.
TASKS = {"translation": "translation", "summarization": "summarization",
         "qa": "question answering", "math_reasoning": "mathematical reasoning",
         "rag": "retrieval-augmented generation"}


def read_questions(path: Path, count: int) -> dict[str, list[str]]:
    """{task: first turns}: `count` of each task, evenly spread."""
    found = {}
    try:
        for line in path.read_text(encoding="utf-8").strip().split("\n"):
            question = json.loads(line)
            task = TASKS.get(question["category"], "multi-turn conversation")
            found.setdefault(task, []).append(str(question["turns"][0]))
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(f"--questions {path}: {error!r}; it must be question.jsonl of "
                         f"Spec-Bench") from None
    if not found:
        raise InputError(f"--questions {path} has no questions")
    chosen = {}
    for task, turns in found.items():
        few = min(count, len(turns))
        chosen[task] = [turns[i * len(turns) // few] for i in range(few)]
    return chosen


def prompt_lookup(args: Namespace, network: torch.nn.Module,
                  prompts: dict[str, list[list[int]]]) -> Iterator[dict]:
    """Rows as those of `bench.compared`, of prompt lookup in transformers. A step is a pass, and a
    plain step is one of transformers without prompt lookup."""
    passes = []
    network.register_forward_hook(lambda *_: passes.append(1))

    def measured(prompt, params, **options):
        """Tokens, passes, and seconds per pass after the first."""
        passes.clear()
        options["min_new_tokens"] = 0  # As in ours, an answer may end.
        made = of_transformers(network, options, params, [prompt], args.new_tokens, args.seed)
        steps = len(passes) - 1  # One is of a run of one token, which takes the time of prefill.
        tokens = 1 + len(made["tokens"][0])
        return tokens, steps, (made["seconds"] - made["prefill_seconds"]) / max(1, steps - 1)

    for t in args.temperatures:
        for task, some in prompts.items():
            found = []
            for prompt in some:
                plain = measured(prompt, Params(t))
                tokens, steps, seconds = measured(prompt, Params(t), prompt_lookup_num_tokens=10)
                found.append((tokens, steps, seconds / plain[2]))
            found = torch.tensor(found, dtype=torch.float64)
            row = {"text": task, "temperature": t, "top-k": 0, "rows": 1,
                   "method": "prompt lookup (transformers)", "accepted": ""}
            yield row | bench.in_columns(bench.factors(found[:, :2], found[:, 2]))


def spec_bench(args: Namespace) -> Iterator[str | dict]:
    """All tables, by task."""
    messages = read_questions(args.questions, args.count)
    model, tokenizer = load_model(args)
    network = None
    if args.prompt_lookup:
        network = load_network(args.model, args.dtype or "float32", model.embedding.device)
    encode = message_encoder(args.model, tokenizer)
    prompts = {}
    for task, some in messages.items():
        prompts[task] = [encode(text) for text in some]
        check_room(prompts[task], args.new_tokens, model.config)
    yield from bench.compared(args, model, tokenizer, lambda temperature: args.methods, prompts)
    if network:
        yield from prompt_lookup(args, network, prompts)


def main() -> None:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add_common(add)
    add("--questions", type=user_path, required=True, help="question.jsonl of Spec-Bench")
    add("--prompt-lookup", action="store_true", help="measure that of transformers")
    bench.add_options(add, bench.DRAFTED + "lookahead count new-tokens temperatures rounds decode "
                      "no-graph")
    parser.set_defaults(rows=[1], top_k=[0], chat=True, count=20, temperatures=[0.0, 1.0])
    args = parser.parse_args()
    bench.check_args(args)
    check_number("--new-tokens", args.new_tokens, 2**20, 8)
    print_tables(spec_bench(args), args.json)


if __name__ == "__main__":
    run_script(main)
