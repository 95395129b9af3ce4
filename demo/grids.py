"""What each column of a block sees, in the methods of beyond/: drawn from the real masks.

    python demo/grids.py fused=2 "tree=0 1 00"

x is the last token of the text. Drafts are d_1, d_2, .. or, in a tree, paths; LA_1/x is the first
look-ahead token after x.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import support

support.ctrl_c_leaves(__name__)
import torch

from beyond.fused import Layout
from beyond.tree import Shape
from demo.steps import grid
from pass_sampler import Lookahead
from support.errors import InputError, check_number, run_script
from support.terminal import new_parser


def layout_of(spec: str) -> tuple[Layout, list[str]]:
    """The block of fused=L, or of tree=PATHS, and the names of its nodes."""
    method, _, shape = spec.partition("=")
    if method == "fused" and shape.isdecimal():
        check_number("L", int(shape), 8)
        L = int(shape)
        paths = [list(range(1 + i)) for i in range(1 + L)]
        names = ["x", *(f"d_{i}" for i in range(1, 1 + L))]
    elif method == "tree":
        tree = Shape(shape, torch.device("cpu"))
        L = tree.depth
        paths = tree.path.tolist()
        names = ["x", *sorted(shape.split(), key=lambda path: (len(path), path))]
    else:
        raise InputError(f"{spec!r} must be fused=L or tree=PATHS")
    return Layout(paths, Lookahead(torch.zeros(L, 1))), names


def grid_of(spec: str) -> list[str]:
    """The lines of one block."""
    layout, names = layout_of(spec)
    columns = list(names)
    for name in names:
        columns += [f"LA_{j}/{name}" for j in range(1, 1 + len(layout.first_group))]
    remarks = [f"at position +{offset}" for offset in layout.offset.tolist()]
    numbers = [str(i) for i in range(1, 1 + len(columns))]
    labels = [f"{i.rjust(2)} {name}" for i, name in zip(numbers, columns)]
    sees = layout.pattern[:, :-1]  # what is committed, as one slot; the columns of the block
    return grid(labels, numbers, sees, remarks)


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("specs", nargs="+", metavar="SPEC", help='fused=L, or "tree=0 1 00"')
    for spec in parser.parse_args().specs:
        print(f"{spec}\n")
        for line in grid_of(spec):
            print(f"    {line}")
        print()


if __name__ == "__main__":
    run_script(main)
