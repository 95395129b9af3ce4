"""demo/RESULTS.md from demo/results: fill its tables, draw its pictures. No figure is typed.

    python demo/page.py              # needs matplotlib, see requirements-bench.txt
    python demo/page.py --check      # only whether the tables are those of the files

A table stands between a line that says what it is and one that ends it:

    <!-- rows FILE: COLUMN, COLUMN; COLUMN=VALUE -->
    <!-- grid FILE: COLUMN; COLUMN, COLUMN; COLUMN=VALUE -->
    <!-- projection FILE: LOOKAHEAD -->
    <!-- end -->

FILE.json is what a command wrote with --json. `rows` shows columns of the rows that fit; `grid` has
a row per value of the first columns, a column per value of the others, and says how many times as
fast; `projection` is computed, from what passes cost and what the look-ahead's file says of it.
train-*.jsonl is what train_lookahead.py measured on its way.
"""
import argparse
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from files import InputError, cell, extra, open_tensors, read_json, run_script, write_file

DEMO = Path(__file__).resolve().parent
RESULTS, PAGE = DEMO / "results", DEMO / "RESULTS.md"
TABLE = re.compile(r"(<!-- (rows|grid|projection) ([\w.-]+): (.*?) -->\n).*?(<!-- end -->)", re.S)
RUNGS = {"ce": "embeddings, ce: the paper", "kl": "embeddings, kl", "tv": "embeddings, tv",
         "memory": "tv + memory", "head": "tv + head", "both": "tv + memory + head"}


def split(text):
    return [word.strip() for word in text.split(",") if word.strip()]


def with_interval(row, column):
    """A cell; of what has an interval, with it."""
    text = cell(row[column])
    if column in ("times as fast", "against one") and "from" in row:
        text += f" ({cell(row['from'])} to {cell(row['to'])})"
    return text


def markdown(heads, rows):
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def table(shape, name, words):
    """The lines of one table, and how it was measured."""
    result = read_json(RESULTS / f"{name}.json")
    said = (f"\n    python {result['command']}\n\n{' '.join(result['text'])} Commit "
            f"{result['commit']}.\n\n")
    if shape == "projection":
        return said + projection(result["rows"], words) + "\n"
    parts = [*words.split(";"), ""]
    columns = split(parts[0])
    conditions = dict(word.split("=", 1) for word in split(parts[2 if shape == "grid" else 1]))
    rows = []
    for row in result["rows"]:
        fits = all(cell(row.get(key, "")) == value for key, value in conditions.items())
        if fits and all(column in row for column in columns):
            rows.append(row)
    if not rows:
        raise InputError(f"no row of {name}.json fits {words}")
    if shape == "rows":
        lines = [[with_interval(row, column) for column in columns] for row in rows]
        heads = columns
    else:
        across = split(parts[1])
        cells, kinds = {}, {}
        for row in rows:
            kind = ", ".join(cell(row[key]) for key in across)
            kinds[kind] = None
            key = tuple(cell(row[column]) for column in columns)
            cells.setdefault(key, {})[kind] = with_interval(row, "times as fast")
        heads = [*columns, *kinds]
        lines = [[*key, *(found.get(kind, "") for kind in kinds)] for key, found in cells.items()]
    return said + markdown(heads, lines) + "\n"


def cost_of(columns, known):
    """The cost of a pass over so many columns, between those measured: known {columns: cost}."""
    above = min(T for T in known if T >= columns)
    below = max(T for T in known if T <= columns)
    share = (columns - below) / max(1, above - below)
    return known[below] * (1 - share) + known[above] * share


def projection(rows, lookahead):
    """Times as fast, if a draft were accepted as often as the look-ahead's file says of its model,
    and a pass cost what was measured, and nothing else took time. Products of these shares are a
    little too low: where one draft is easy the next is too."""
    with open_tensors(DEMO.parent / lookahead) as file:
        acceptance = json.loads(file.metadata()["lookahead"])["acceptance"]
    first = rows[0]["after tokens"]
    known = {row["columns"]: row["against one"] for row in rows if row["after tokens"] == first}
    lines = []
    for temperature, measured in acceptance.items():
        accepted, product = 0.0, 1.0
        for L, share in enumerate(measured["by_position"], 1):
            if (1 + L) ** 2 > max(known):
                break
            product *= share
            accepted += product
            of_pass = (2 + accepted) / (2 * cost_of(1 + L, known))
            fused = (1 + accepted) / cost_of((1 + L) ** 2, known)
            lines.append([temperature, str(L), cell(accepted), cell(of_pass), cell(fused)])
    return markdown(["temperature", "L", "accepted", "pass", "fused"], lines)


def filled(text):
    """The page with its tables made anew."""
    return TABLE.sub(lambda m: m[1] + table(m[2], m[3], m[4]) + m[5], text)


# ----------------------------------------------------------- pictures

def figure(panels):
    """A figure of matplotlib and its axes."""
    matplotlib, Figure = extra("matplotlib"), extra("matplotlib.figure").Figure
    matplotlib.rcParams["svg.hashsalt"] = "pass"  # or the file changes from run to run
    drawing = Figure(figsize=(3 + 3.2 * panels, 3.4), layout="constrained")
    axes = drawing.subplots(1, panels, sharey=True, squeeze=False)[0]
    for axis in axes:
        axis.grid(alpha=0.3)
    return drawing, axes


def save(drawing, axes, name):
    drawing.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper")
    write_file(RESULTS / f"{name}.svg", lambda path: drawing.savefig(
        path, format="svg", metadata={"Date": None}))


def draw_training(name):
    """Expected accepted drafts over steps, a line per rung, a panel per temperature."""
    drawing, axes = figure(2)
    for axis, temperature in zip(axes, ("0.0", "1.0")):
        for rung, label in RUNGS.items():
            path = RESULTS / f"train-{name}-{rung}.jsonl"
            if not path.exists():
                continue
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            expected = [line["acceptance"][temperature]["expected"] for line in lines]
            axis.plot([line["step"] for line in lines], expected, label=label)
        axis.set(title=f"temperature {float(temperature):g}", xlabel="steps")
    axes[0].set(ylabel="expected accepted drafts")
    save(drawing, axes, f"train-{name}")


def draw(name, x, y, series, panels):
    """Column y over column x with its interval, a line per value of `series`."""
    rows = read_json(RESULTS / f"{name}.json")["rows"]
    kinds = list(dict.fromkeys(row[panels] for row in rows))
    drawing, axes = figure(len(kinds))
    for axis, kind in zip(axes, kinds):
        lines = {}
        for row in rows:
            if row[panels] == kind:
                lines.setdefault(row[series], []).append(row)
        for label, points in lines.items():
            middle = [row[y] for row in points]
            spread = [[row[y] - row["from"] for row in points],
                      [row["to"] - row[y] for row in points]]
            axis.errorbar([row[x] for row in points], middle, spread, label=label, capsize=2)
        axis.set(title=f"{panels} {cell(kind)}", xlabel=x)
    axes[0].set(ylabel=y)
    save(drawing, axes, name)


PICTURES = {
    "smollm2-cost": ("columns", "against one", "after tokens", "weights"),
    "smollm2-speed": ("temperature", "times as fast", "method", "text"),
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args()
    before = PAGE.read_text()
    after = filled(before)
    if args.check:
        if before != after:
            raise InputError("demo/RESULTS.md is not that of demo/results: run demo/page.py")
        return
    write_file(PAGE, lambda path: path.write_text(after))
    for name in ("smollm2", "demo"):
        draw_training(name)
    for name, words in PICTURES.items():
        draw(name, *words)


if __name__ == "__main__":
    run_script(main)
