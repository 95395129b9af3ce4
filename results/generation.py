"""A picture of one generation: accepted drafts are marked.

    python results/generation.py --model DIR --lookahead FILE --prompt TEXT --out FILE.svg
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import support

support.ctrl_c_leaves(__name__)
from html import escape

import beyond  # noqa: F401  its look-ahead
from model import load_model
from pass_sampler import Params, generate, load_lookahead
from support.errors import check_seed, run_script
from support.storage import check_writable, write_text
from support.terminal import add_common, new_parser, user_path, visible

COLUMNS, WIDTH, HEIGHT = 88, 8.4, 19  # characters per line; of one, in points
STYLE = """
text { font: 14px ui-monospace, Menlo, Consolas, monospace; fill: #1f2328; white-space: pre }
.prompt, .not { fill: #6e7781 } .draft, .accepted { fill: #1a7f37; font-weight: bold }
.rejected { fill: #cf222e } .note { font-style: italic }
@media (prefers-color-scheme: dark) {
  text { fill: #d1d7e0 } .prompt, .not { fill: #8b949e } .draft, .accepted { fill: #3fb950 }
  .rejected { fill: #ff7b72 }
}"""


def lines_of(pieces: list[tuple[str, str]]) -> list[list[tuple[str, str]]]:
    """Pieces (text, class) of a text as lines, each a list of pieces, wrapped at COLUMNS."""
    lines = [[]]
    column = 0
    for text, kind in pieces:
        for i, part in enumerate(text.split("\n")):
            if i or column + len(part) > COLUMNS:
                lines.append([])
                column = 0
            lines[-1].append((part, kind))
            column += len(part)
    return lines


def picture(lines: list[list[tuple[str, str]]]) -> str:
    """The SVG of lines, each a list of pieces (text, class)."""
    rows = []
    columns = COLUMNS
    for line in lines:
        columns = max(columns, sum(len(part) for part, _ in line))
        spans = ""
        for part, kind in line:
            spans += f'<tspan class="{kind}">{escape(visible(part))}</tspan>'
        y = HEIGHT * (len(rows) + 1)
        rows.append(f'<text x="8" y="{y}" xml:space="preserve">{spans}</text>')
    width, height = WIDTH * columns + 16, HEIGHT * (len(rows) + 1)
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}">'
            f"<style>{STYLE}</style>\n" + "\n".join(rows) + "\n</svg>\n")


def main() -> None:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add_common(add)
    add("--lookahead", required=True, metavar="FILE", help="trained")
    add("--prompt", required=True, help="text to continue")
    add("--temperature", type=float, default=0.0, help="(default: 0, greedy)")
    add("--max-new-tokens", type=int, default=160, help="(default: 160)")
    add("--out", type=user_path, required=True, help="SVG file to write")
    args = parser.parse_args()
    check_seed(args.seed)
    check_writable(args.out)
    model, tokenizer = load_model(args)
    lookahead = load_lookahead(args.lookahead, model, tokenizer=tokenizer)
    result = generate(model, [tokenizer.encode(args.prompt)], "pass", Params(args.temperature),
                      args.max_new_tokens, args.seed, lookahead=lookahead)
    stream = tokenizer.stream()
    pieces = [(args.prompt, "prompt")]
    for token, from_draft in zip(result["tokens"][0], result["from_draft"][0]):
        pieces.append((stream(token), "draft" if from_draft else "own"))
    drafts = sum(result["from_draft"][0])
    tokens = len(result["tokens"][0])
    note = (f"{tokens} tokens in {result['passes']} passes; {drafts} of them are accepted drafts. "
            f"Plain decoding takes {tokens} passes.")
    write_text(args.out, picture([*lines_of(pieces), [], [(note, "note")]]))


if __name__ == "__main__":
    run_script(main)
