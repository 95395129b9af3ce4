"""Planted bugs are caught: tests/mutants.py has the table. `make mutants` plants the slow ones too."""
import pytest

from mutants import MUTANTS, SLOW, caught


@pytest.mark.parametrize("name", [name for name, bug in MUTANTS.items() if bug.check not in SLOW])
def test_planted_bug_is_caught(name):
    caught(name)
