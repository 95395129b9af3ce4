"""What the pages say of the code is there: files, targets, commands, the table from papers to code,
figures. `make pages` runs this; it is no part of `make test`, whose failures say what is wrong with
the method, and not with a page."""
import contextlib
import importlib
import inspect
import io
import operator
import re
import shlex
import sys

import commands as documented
import pytest
from common import ROOT

PAGES = {}
for name in documented.PAGES[:-1]:  # Those of results/README.md are of the commits that ran them.
    PAGES[name] = (ROOT / name).read_text()
ALL = "\n".join(PAGES.values())
WALK = re.findall(r"^\|[^|]*\|[^|]*\| `([\w.]+)` \| `(.+)` \|$", ALL, re.M)  # function, line


@pytest.mark.parametrize("name, line", WALK)
def test_walk_through_the_code(name, line):
    modules = map(importlib.import_module, ("model", "pass_sampler", "train_lookahead"))
    home = next(module for module in modules if hasattr(module, name.split(".")[0]))
    assert line in inspect.getsource(operator.attrgetter(name)(home))


def test_the_walk_is_whole():
    names = {function for function, _ in WALK}
    assert len(WALK) >= 10 and {"parallel", "verify", "residual", "loss_of"} <= names


def paths():
    """(page, path) of all files that pages name."""
    found = set()
    for page, text in PAGES.items():
        for path in re.findall(r"`([\w./-]+\.(?:py|md))`|\]\(([\w./-]+)\)", text):
            found.add((page, "".join(path)))
    return sorted(found)


@pytest.mark.parametrize("page, path", paths())
def test_files_exist(page, path):
    assert any((ROOT / folder / path).exists() for folder in ("", page.rpartition("/")[0]))


@pytest.mark.parametrize("target", sorted(set(re.findall(r"^    make (\w[\w-]*)", ALL, re.M))))
def test_targets_exist(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M)


def commands():
    """Words of each command line of Python on a page, shell variables left out."""
    found = {}
    for block in re.findall(r"^    python (?:[^\n]*\\\n)*[^\n]*", ALL, re.M):
        words = shlex.split(block.replace("\\\n", " "), comments=True)
        found[" ".join(words[1:])] = words[1:]
    return found


@pytest.mark.parametrize("words", commands().values(), ids=commands().keys())
def test_commands_have_their_options(words, monkeypatch):
    """Each script has every option that a page gives it."""
    if words[0] == "-m":
        words = [words[1].replace(".", "/") + ".py", *words[2:]]
    name = words[0].removesuffix(".py").replace("/", ".")
    module = importlib.import_module(name)
    subcommand = words[1:2] if words[0] == "bench.py" else []
    monkeypatch.setattr(sys, "argv", [words[0], *subcommand, "--help"])
    said = io.StringIO()
    with contextlib.redirect_stdout(said), pytest.raises(SystemExit) as ended:
        module.main()
    known = set(re.findall(r"--[a-z][\w-]*", said.getvalue()))
    assert ended.value.code == 0 and {word for word in words if word.startswith("--")} <= known


def test_figures_are_those_of_the_result_files(monkeypatch):
    from results import page
    for path in page.PAGES:
        text = path.read_text()
        assert page.filled(text) == text, f"{path.name}: run results/page.py"


def test_grids_are_those_of_the_masks():
    from demo.grids import grid_of
    found = re.search("<!-- grids -->\n(.*?)\n<!-- end -->", PAGES["beyond/README.md"], re.S)[1]
    for spec in ("fused=2", "tree=0 1 00"):
        assert "\n".join(f"    {line}" for line in grid_of(spec)) in found, "run demo/grids.py"
