"""Tables of figures: on the screen as they are made, and in JSON files."""
import json
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from support.storage import check_writable, write_text


def cell(value: float | int | str) -> str:
    """A number of a table, or a word, as text."""
    if isinstance(value, float):
        digits = 2 - sum(abs(value) >= bound for bound in (10, 100))
        return f"{value:.1g}" if 0 < abs(value) < 0.005 else f"{value:.{digits}f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def commit() -> str:
    """The commit of the code; with a + where a .py file has been changed since."""
    def git(*words):
        return subprocess.run(["git", *words], cwd=Path(__file__).parent.parent, check=True,
                              text=True, capture_output=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "*.py")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def print_tables(parts: Iterable[str | dict], path: Path | None) -> None:
    """Print paragraphs (str) and rows of tables (dict) as they come; keep them in a JSON file, if
    path names one. That the file can be written is checked before the first part is made."""
    if path:
        check_writable(path)
    text = []
    rows = []
    columns = None
    of_code = commit()
    for part in parts:
        if isinstance(part, str):
            text.append(part)
            columns = None
            print(f"\n{part}", flush=True)
            continue
        if list(part) != columns:
            columns = list(part)
            print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
        rows.append(part)
        print(f"| {' | '.join(map(cell, part.values()))} |", flush=True)
    if path:
        about = {"command": shlex.join(sys.argv), "commit": of_code,
                 "python": platform.python_version(), "text": text, "rows": rows}
        write_text(path, json.dumps(about, indent=1) + "\n")
