"""Make demo/prompts.json and demo/model/prompts.json, the prompts of bench.py: nothing of them was
trained on.

    python demo/recipes/prompts.py --data data --plain models/pretrain/held

For SmolLM2 code, from the files of --data that training holds out, and prose, their docstrings. For
demo/model code in the one spelling that it knows, from --plain, what pretrain.py held out, and of
it what the training of its look-ahead holds out. README.md beside this says where both come from.
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

from support.data import split_files
from support.errors import InputError, run_script
from support.storage import write_text
from support.terminal import new_parser, user_path

PROMPTS, CHARACTERS = 20, 280


def docstrings(source):
    """Those of a module, its classes and functions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            yield ast.get_docstring(node) or ""


def pieces(texts, begin):
    """CHARACTERS of a text from wherever it matches `begin`."""
    found = []
    for text in texts:
        if text.isascii() and ">>>" not in text:
            starts = [match.start() for match in begin.finditer(text)]
            found += [text[i:i + CHARACTERS] for i in starts if i + CHARACTERS < len(text)]
    return found


def main():
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--data", type=user_path, nargs="+", required=True, help="the standard library")
    add("--plain", type=user_path, nargs="+", required=True, help="what pretrain.py held out")
    args = parser.parse_args()
    sources = [file.read_text(errors="replace") for file in split_files(args.data, ".py")[1]]
    prose = [text for source in sources for text in docstrings(source)]
    plain = [file.read_text() for file in split_files(args.plain, ".py")[1]]
    # Code begins with a function or a class, prose with its first sentence.
    code = re.compile("(?m)^(def|class) ")
    texts = {"code": pieces(sources, code), "prose": pieces(prose, re.compile("^")),
             "modules": pieces(plain, code)}
    chance = random.Random(0)
    prompts = {}
    for name, found in texts.items():
        if len(found) < PROMPTS:
            raise InputError(f"only {len(found)} pieces of {name} were found, {PROMPTS} are needed")
        prompts[name] = [text.rsplit(maxsplit=1)[0] for text in chance.sample(found, PROMPTS)]
    contents = {"prompts.json": ["code", "prose"], "model/prompts.json": ["modules"]}
    for path, names in contents.items():
        text = json.dumps({name: prompts[name] for name in names}, indent=1) + "\n"
        write_text(Path(__file__).resolve().parents[1] / path, text)


if __name__ == "__main__":
    run_script(main)
