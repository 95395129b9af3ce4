"""Runs the commands that pages document, in a clone of its own, and says which of them fail.

    .venv/bin/python tests/commands.py            # seven minutes on 2 cores
    .venv/bin/python tests/commands.py README.md  # one page

Each block of commands is a script for bash, in which names in capitals stand for files that ship,
and `python` and `make` are functions that shorten what takes long: SHORT and REAL say how. What
then runs is another matter than what it measures: this only shows that the commands are right.
"""
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "CONTRIBUTING.md", "beyond/README.md", "demo/README.md",
         "demo/recipes/README.md", "tests/README.md", "results/README.md")
FIRST = r"(make|python|source|\.venv/bin/python) |[A-Z]+="  # what the first line begins with

FEW = "--count 2 --new-tokens 9 --temperatures 0"
SHORT = {  # options that are added: the last of two counts
    "pass_sampler.py": "--max-new-tokens 8",
    "train_lookahead.py": "--steps 2 --batch 2",
    "beyond.own_texts": "--count 60 --new-tokens 24",
    "demo/recipes/distill.py": "--steps 2",
    "bench.py speed": FEW + " --rounds 2 --decode 1",
    "bench.py length": FEW + " --rounds 2 --decode 1",
    "bench.py acceptance": FEW,
    "bench.py cost": "--rounds 2",
    "results/quality.py": "--count 2 --new-tokens 9 --tokens 100",
    "pytest": "--collect-only -q",
}
SKIPPED = {
    "demo/recipes/pretrain.py": "it trains for an hour", "results/humaneval.py": "an hour",
    "results/peers.py": "needs llama.cpp", "results/spec_bench.py": "needs question.jsonl",
    "tests/mutants.py": "make mutants runs it", "--device cuda": "needs a GPU",
    "--shape": "needs 20 GB",
}
REAL = ("demo", "steps", "help", "lint")  # These are run; of other targets make says what it would.
NAMES = {
    "--model DIR --lookahead FILE --chat":
        "--model models/smollm2 --lookahead demo/smollm2-lookahead.safetensors --chat",
    "--lookahead FILE": "--lookahead demo/model/lookahead.safetensors",
    "--prompt-file FILE": "--prompt-file LICENSE", "--out FILE": "--out new.safetensors",
    "--chat FILE": "--chat demo/messages.json", "chat.json": "demo/messages.json",
    "--start FILE": "--start demo/smollm2-lookahead.safetensors",
    "SMALLER_DIR": "demo/model", "DIR": "demo/model", "PATHS": "support tests",
    "OWN": "own.safetensors", "FILE": "new.json",
    ".venv/bin/python": "python", "models/pretrain/held": "data",
}
PRELUDE = """set -e
python() { command python tests/commands.py --run python "$@"; }
make() { command python tests/commands.py --run make "$@"; }
"""


def blocks(text: str) -> list[str]:
    """The blocks of commands on a page: what is indented by four spaces and begins as one does."""
    text = re.sub("```.*?```", "", text, flags=re.S)
    found = re.findall(r"(?:^    .*\n)+", text, re.M)
    return [block for block in found if re.match(f"    ({FIRST})", block)]


def script_of(block: str) -> str:
    """What bash runs for a block."""
    for name, real in NAMES.items():
        block = re.sub(rf"(?<![\w/.-]){re.escape(name)}(?![\w/])", real, block)
    return PRELUDE + block


def run(words: list[str]) -> int:
    """Run one command of a page, shortened, and say how it went."""
    line = " ".join(words)
    began = time.perf_counter()
    why = next((why for what, why in SKIPPED.items() if what in line), None)
    if words[0] == "make" and words[1] not in REAL:
        words = [words[0], "-n", *words[1:]]
        why = None
    elif words[0] == "python":
        more = next((more for what, more in SHORT.items() if what in line), "")
        if "--help" not in words:
            words = [*words, *more.split()]
    code, last = 0, why and f"not run: {why}"
    if not why:
        done = subprocess.run(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        code = done.returncode
        last = done.stderr.strip().split("\n")[-1] if code else "ok"
    print(f"{time.perf_counter() - began:6.1f} s  {line[:90]}: {last}", flush=True)
    return code


def main() -> int:
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "clone"
        subprocess.run(["git", "clone", "-q", ROOT, clone], check=True)
        for file in clone.rglob("*"):
            os.utime(file, (0, 0))  # so that make makes nothing anew
        (clone / "models").mkdir()  # What is made there stays in the clone.
        for name in (".venv", "models/smollm2"):
            (clone / name).symlink_to(ROOT / name)
        path = f"{ROOT / '.venv' / 'bin'}:{os.environ['PATH']}"
        for page in sys.argv[1:] or PAGES:
            print(page)
            for block in blocks((clone / page).read_text(encoding="utf-8")):
                done = subprocess.run(["bash", "-c", script_of(block)], cwd=clone,
                                      stdin=subprocess.DEVNULL, env={**os.environ, "PATH": path})
                if done.returncode:
                    failed += 1
                    print(f"FAILED, of {page}:\n{block}", flush=True)
    print(f"{failed} blocks failed")
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(run(sys.argv[2:]) if sys.argv[1:2] == ["--run"] else main())
