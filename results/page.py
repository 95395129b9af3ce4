"""The tables of README.md here and of the front page, from the files here: no figure is typed.

    python results/page.py              # needs matplotlib, see requirements-bench.txt
    python results/page.py --check      # only whether the tables are those of the files

A table or figure stands between a mark that says what it is and one that ends it:

    <!-- cell FILE: COLUMN; COLUMN=VALUE, COLUMN=VALUE -->
    <!-- rows FILE: COLUMN, COLUMN; COLUMN=VALUE -->
    <!-- grid FILE: COLUMN; COLUMN, COLUMN; COLUMN=VALUE -->
    <!-- bare FILE: COLUMN; COLUMN, COLUMN; COLUMN=VALUE -->
    <!-- projection FILE: LOOKAHEAD -->
    <!-- training MODEL: TEMPERATURE, TEMPERATURE -->
    <!-- source FILE: -->
    <!-- end -->

FILE.json is what a command wrote with --json. `cell` is one figure and its interval; `rows` shows
columns of the rows that fit; `grid` has a row per value of the first columns, a column per value of
the others, and says how many times as fast; `bare` is a grid without intervals; `projection` is
computed, from what passes cost and what the look-ahead's file says of it; `training` shows how the
trainings for a model ended, by train-MODEL-NAME.jsonl, which is what train_lookahead.py measured on
its way. `source` says by which command, on what and with which commit a file was made.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import support

support.ctrl_c_leaves(__name__)
import json
import re

from support.errors import InputError, extra, run_script
from support.storage import open_tensors, read_json, write_file, write_text
from support.tables import cell
from support.terminal import new_parser

RESULTS = Path(__file__).resolve().parent
ROOT = RESULTS.parent
PAGES = RESULTS / "README.md", ROOT / "README.md"
TABLE = re.compile(r"(<!-- (\w+) ([\w.-]+):(.*?) -->\n?).*?(<!-- end -->)", re.S)
TRAININGS = {"files": "ce, on texts of files", "ce": "ce", "kl": "kl", "tv": "tv",
             "memory": "tv, + memory", "head": "tv, + head", "both": "tv, + memory, + head"}


def split(text):
    return [word.strip() for word in text.split(",") if word.strip()]


def interval_of(row, column):
    """[low, high] of a column, or nothing. A row with one interval may call it from and to."""
    if f"{column} from" in row:
        return row[f"{column} from"], row[f"{column} to"]
    if column in ("times as fast", "against one") and "from" in row:
        return row["from"], row["to"]
    return []


LABELS = {"autoregressive": "plain decoding", "pass:unk": "untrained",
          "pass=3": "PaSS + memory + head, L = 3", "pass": "PaSS + memory + head",
          "fused=1": "fused, L = 1", "tree=0 1": "tree of two candidates",
          "pass:demo/smollm2-paper.safetensors": "PaSS, the paper"}
for length in (1, 2, 3, 4, 6, 8):
    LABELS[f"pass:demo/smollm2-paper.safetensors={length}"] = f"PaSS, the paper, L = {length}"


def with_interval(row, column):
    """A cell; of what has an interval, with it."""
    if column == "method":
        return LABELS.get(row[column], row[column])
    between = " to ".join(map(cell, interval_of(row, column)))
    return cell(row[column]) + (f" ({between})" if between else "")


def gain_in(row):
    """The column that says how many times as fast."""
    return "gain" if "gain" in row else "times as fast"


def markdown(heads, rows):
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def fitting(rows, columns, conditions):
    """The rows that have the columns, and in which each of "COLUMN=VALUE, .." holds."""
    wanted = dict(word.split("=", 1) for word in split(conditions))
    found = []
    for row in rows:
        holds = all(cell(row.get(key, "")) == value for key, value in wanted.items())
        if holds and all(column in row for column in columns):
            found.append(row)
    if not found:
        raise InputError(f"no row has {', '.join(columns)} with {conditions}")
    return found


def grid(rows, columns, across, show):
    """How many times as fast: a row per value of `columns`, a column per value of `across`."""
    heads = {}
    lines = {}
    for row in rows:
        head = ", ".join(with_interval(row, key) for key in across)
        heads[head] = None
        names = tuple(with_interval(row, column) for column in columns)
        lines.setdefault(names, {})[head] = show(row, gain_in(row))
    cells = []
    for names, line in lines.items():
        cells.append([*names, *(line.get(head, "") for head in heads)])
    return markdown([*columns, *heads], cells)


def table(shape, name, words):
    """What stands between two marks."""
    if shape == "training":
        return training(name, split(words))
    result = read_json(RESULTS / f"{name}.json")
    if shape == "source":
        return (f"\n    python {result['command']}\n\n{result['text'][0]} Commit "
                f"{result['commit']}.\n\n")
    if shape == "projection":
        return projection(result["rows"], words.strip())
    parts = [*words.split(";"), "", ""]
    columns = split(parts[0])
    rows = fitting(result["rows"], columns, parts[1 if shape in ("cell", "rows") else 2])
    if shape == "cell":
        return with_interval(rows[0], columns[0])
    if shape == "rows":
        lines = [[with_interval(row, column) for column in columns] for row in rows]
        return markdown(columns, lines)
    show = with_interval if shape == "grid" else lambda row, column: cell(row[column])
    return grid(rows, columns, split(parts[1]), show)


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
    with open_tensors(ROOT / lookahead) as file:
        acceptance = json.loads(file.metadata()["lookahead"])["acceptance"]
    first = rows[0]["after tokens"]
    known = {row["columns"]: row["against one"] for row in rows if row["after tokens"] == first}
    lines = []
    for temperature, measured in acceptance.items():
        accepted = 0.0
        product = 1.0
        for L, share in enumerate(measured["by_position"], 1):
            if (1 + L) ** 2 > max(known):
                break
            product *= share
            accepted += product
            of_pass = (2 + accepted) / (2 * cost_of(1 + L, known))
            fused = (1 + accepted) / cost_of((1 + L) ** 2, known)
            lines.append([temperature, str(L), cell(accepted), cell(of_pass), cell(fused)])
    return markdown(["temperature", "L", "accepted", "pass", "fused"], lines)


def trainings(model):
    """{label: lines} of the trainings of look-aheads for a model."""
    found = {}
    for name, label in TRAININGS.items():
        path = RESULTS / f"train-{model}-{name}.jsonl"
        if path.exists():
            lines = path.read_text(encoding="utf-8").splitlines()
            found[label] = [json.loads(line) for line in lines]
    return found


def training(model, temperatures):
    """Accepted drafts at the end; and minutes, as if each part had been as quick as the quickest.
    """
    heads = ["trained", *(f"accepted at {t}" for t in temperatures), "minutes"]
    rows = []
    for label, lines in trainings(model).items():
        expected = [lines[-1]["acceptance"][t]["expected"] for t in temperatures]
        seconds = [b["seconds"] - a["seconds"] for a, b in zip(lines, lines[1:])]
        minutes = min(seconds) * len(seconds) / 60
        rows.append([label, *map(cell, expected), cell(minutes)])
    return markdown(heads, rows)


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
    """Expected accepted drafts over steps, a line per training, a panel per temperature."""
    lines_of = trainings(name)
    if not lines_of:
        return
    drawing, axes = figure(2)
    for axis, temperature in zip(axes, ("0.0", "1.0")):
        for label, lines in lines_of.items():
            expected = [line["acceptance"][temperature]["expected"] for line in lines]
            axis.plot([line["step"] for line in lines], expected, label=label)
        axis.set(title=f"temperature {float(temperature):g}", xlabel="steps")
    axes[0].set(ylabel="expected accepted drafts")
    save(drawing, axes, f"train-{name}")


def draw(name, x, y, series, panels):
    """Column y (None: the gain) over column x with its interval, a line per value of `series`."""
    rows = read_json(RESULTS / f"{name}.json")["rows"]
    y = y or gain_in(rows[0])
    kinds = list(dict.fromkeys(row[panels] for row in rows))
    drawing, axes = figure(len(kinds))
    for axis, kind in zip(axes, kinds):
        lines = {}
        for row in rows:
            if row[panels] == kind:
                lines.setdefault(row[series], []).append(row)
        for label, points in lines.items():
            middle = [row[y] for row in points]
            below, above = [], []
            for row in points:
                low, high = interval_of(row, y)
                below.append(row[y] - low)
                above.append(high - row[y])
            axis.errorbar([row[x] for row in points], middle, [below, above], label=label,
                          capsize=2)
        axis.set(title=f"{panels} {cell(kind)}", xlabel=x)
    axes[0].set(ylabel=y)
    save(drawing, axes, name)


PICTURES = {
    "smollm2-cost": ("columns", "against one", "after tokens", "weights"),
    "smollm2-speed": ("temperature", None, "method", "text"),
}


def main():
    parser = new_parser(__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args()
    for page in PAGES:
        before = page.read_text(encoding="utf-8")
        after = filled(before)
        if args.check and before != after:
            raise InputError(f"{page.relative_to(ROOT)} is not that of the files in results/: run "
                             f"results/page.py")
        if not args.check:
            write_text(page, after)
    if args.check:
        return
    for model in ("smollm2", "demo"):
        draw_training(model)
    for name, words in PICTURES.items():
        draw(name, *words)


if __name__ == "__main__":
    run_script(main)
