"""A picture of one step of PaSS, as demo/steps.py tells it.

    python results/step.py --seed 20 --out results/step.svg
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import support

support.ctrl_c_leaves(__name__)
from demo import steps
from results.generation import picture
from support.errors import run_script
from support.storage import check_writable, write_text
from support.terminal import new_parser, user_path


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--out", type=user_path, required=True, help="SVG file to write")
    args = steps.parse(parser)
    check_writable(args.out)
    lines = next(steps.tell(args))
    write_text(args.out, picture(lines))


if __name__ == "__main__":
    run_script(main)
