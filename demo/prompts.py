"""Make demo/prompts.json, the prompts of bench.py, from modules that none of the files in demo/ was trained on.

    python demo/prompts.py --data data     # the folder of README's "Train a look-ahead", Python 3.11

Three kinds: code, as it stands in the files that train_lookahead.py holds out; prose, their docstrings; and plain code, without
comments and in the one spelling that demo/model knows, from the modules that demo/pretrain.py holds out.
"""
import argparse
import ast
import json
import random
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from demo.pretrain import is_held, modules, normal
from model import run_script, write_file
from train_lookahead import split_files

PROMPTS, CHARACTERS = 20, 280


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="as for train_lookahead.py")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("prompts.json"), help="default: %(default)s")
    args = parser.parse_args()
    sources = [file.read_text(errors="replace") for file in split_files(args.data, ".py")[1]]
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    prose = [ast.get_docstring(node) or "" for source in sources for node in ast.walk(ast.parse(source)) if isinstance(node, documented)]
    plain = [normal(source.decode(errors="replace")) for package, name, source in modules(Path()) if is_held(name)]
    chance, prompts = random.Random(0), {}
    for kind, texts in {"code": sources, "prose": prose, "plain code": plain}.items():
        # Code begins with a function or a class, prose with its first sentence.
        pieces = [text[at.start():at.start() + CHARACTERS] for text in texts if text and text.isascii() and ">>>" not in text
                  for at in re.finditer("^" if kind == "prose" else "(?m)^(def|class) ", text) if at.start() + CHARACTERS < len(text)]
        prompts[kind] = [piece.rsplit(maxsplit=1)[0] for piece in chance.sample(pieces, PROMPTS)]
    write_file(args.out, lambda temporary: temporary.write_text(json.dumps(prompts, indent=1) + "\n"))


if __name__ == "__main__":
    run_script(main)
