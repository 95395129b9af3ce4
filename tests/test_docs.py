"""What the pages say of the code is there."""
import ast
import re

import pytest

from common import ROOT

README = (ROOT / "README.md").read_text()
PAGES = README + (ROOT / "beyond" / "README.md").read_text()
WALK = re.findall(r"^\|[^|]*\|[^|]*\| `([\w.]+)` \| `(.+)` \|$", README, re.M)  # function, line


def functions():
    """{name: source} of the functions and methods, a method by Class.name."""
    found = {}
    for file in ("model.py", "pass_sampler.py", "train_lookahead.py", "beyond/tree.py"):
        source = (ROOT / file).read_text()
        for node in ast.parse(source).body:
            for inner in [node] + (node.body if isinstance(node, ast.ClassDef) else []):
                if isinstance(inner, ast.FunctionDef):
                    name = inner.name if inner is node else f"{node.name}.{inner.name}"
                    found[name] = ast.get_source_segment(source, inner)
    return found


@pytest.mark.parametrize("function, line", WALK)
def test_walk_through_the_code(function, line):
    assert line in functions()[function]


def test_the_walk_is_whole():
    names = {function for function, _ in WALK}
    assert len(WALK) >= 12 and {"parallel", "verify", "residual", "loss_of"} <= names


PATHS = sorted(set(re.findall(r"`((?:demo|tests|beyond)/[\w./-]+|\w+\.py)`", PAGES)))


@pytest.mark.parametrize("path", PATHS)
def test_files_exist(path):
    assert any((ROOT / folder / path).exists() for folder in ("", "tests", "beyond"))


@pytest.mark.parametrize("target", sorted(set(re.findall(r"^    make (\w[\w-]*)", PAGES, re.M))))
def test_targets_exist(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M)
