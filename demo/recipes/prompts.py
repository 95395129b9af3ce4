"""Make the prompts of bench.py from files that training holds out: nothing of them was trained on.

    python demo/recipes/prompts.py --data data --kinds code prose --out demo/prompts.json
    python demo/recipes/prompts.py --data models/pretrain/held --kinds modules \
        --out demo/model/prompts.json
    python demo/recipes/prompts.py --data data --kinds code --characters 6500 --count 8 --out FILE

Code begins with a function or a class; prose, of docstrings, with its first sentence; modules are
code in the one spelling that demo/model knows. README.md beside this says where the files are from.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import support

support.ctrl_c_leaves(__name__)
import ast
import json
import random
import re

from support.data import add_data, split_files
from support.errors import InputError, run_script
from support.storage import write_text
from support.terminal import new_parser, user_path


def docstrings(source):
    """Those of a module, its classes and functions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            yield ast.get_docstring(node) or ""


def pieces(texts, begin, length):
    """`length` characters of a text from wherever it matches `begin`."""
    found = []
    for text in texts:
        if text.isascii() and ">>>" not in text:
            starts = [match.start() for match in begin.finditer(text)]
            found += [text[i:i + length] for i in starts if i + length < len(text)]
    return found


def main():
    parser = new_parser(__doc__)
    add = parser.add_argument
    add_data(add)
    add("--kinds", nargs="+", choices=["code", "modules", "prose"], required=True)
    add("--count", type=int, default=40, help="of each kind (default: 40)")
    add("--characters", type=int, default=280, help="of a prompt, at most (default: 280)")
    add("--out", type=user_path, required=True, help="JSON file to write")
    parser.set_defaults(suffix=".py")
    args = parser.parse_args()
    sources = [file.read_text(errors="replace") for file in split_files(args.data, args.suffix)[1]]
    chance = random.Random(0)
    prompts = {}
    for kind in args.kinds:
        texts, begin = sources, "(?m)^(def|class) "
        if kind == "prose":
            texts, begin = [text for source in sources for text in docstrings(source)], "^"
        found = pieces(texts, re.compile(begin), args.characters)
        if len(found) < args.count:
            raise InputError(f"only {len(found)} pieces of {kind} were found, {args.count} are "
                             f"needed")
        prompts[kind] = [text.rsplit(maxsplit=1)[0] for text in chance.sample(found, args.count)]
    write_text(args.out, json.dumps(prompts, indent=1) + "\n")


if __name__ == "__main__":
    run_script(main)
