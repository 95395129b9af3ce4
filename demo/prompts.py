"""Make demo/prompts.json and demo/model/prompts.json, the prompts of bench.py, from what nothing in demo/ was trained on.

    python demo/prompts.py --data data --plain models/pretrain/held     # of README's "Train a look-ahead", and of demo/pretrain.py

For SmolLM2 code, as it stands in the files of --data that training holds out, and prose, their docstrings. For demo/model
code in the one spelling that it knows, from what training holds out of what demo/pretrain.py held out.
"""
import argparse
import ast
import json
import random
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from files import InputError, run_script, split_files, write_file

PROMPTS, CHARACTERS = 20, 280


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="as for train_lookahead.py: the standard library")
    parser.add_argument("--plain", type=Path, nargs="+", required=True, help="what demo/pretrain.py held out")
    args = parser.parse_args()
    sources = [file.read_text(errors="replace") for file in split_files(args.data, ".py")[1]]
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    prose = [ast.get_docstring(node) or "" for source in sources for node in ast.walk(ast.parse(source))
             if isinstance(node, documented)]
    plain = [file.read_text() for file in split_files(args.plain, ".py")[1]]
    chance, prompts = random.Random(0), {}
    for kind, texts in {"code": sources, "prose": prose, "plain code": plain}.items():
        # Code begins with a function or a class, prose with its first sentence.
        begin = re.compile("^" if kind == "prose" else "(?m)^(def|class) ")
        pieces = [text[at.start():at.start() + CHARACTERS] for text in texts if text.isascii() and ">>>" not in text
                  for at in begin.finditer(text) if at.start() + CHARACTERS < len(text)]
        if len(pieces) < PROMPTS:
            raise InputError(f"only {len(pieces)} pieces of {kind} were found, {PROMPTS} are needed")
        prompts[kind] = [piece.rsplit(maxsplit=1)[0] for piece in chance.sample(pieces, PROMPTS)]
    for path, kinds in (("prompts.json", ("code", "prose")), ("model/prompts.json", ("plain code",))):
        text = json.dumps({kind: prompts[kind] for kind in kinds}, indent=1) + "\n"
        write_file(Path(__file__).parent / path, lambda temporary: temporary.write_text(text))


if __name__ == "__main__":
    run_script(main)
