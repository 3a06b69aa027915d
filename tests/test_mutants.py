"""The table of `make mutants`."""

from pathlib import Path

from mutants.__main__ import stale
from mutants.table import MUTANTS

ROOT = Path(__file__).resolve().parents[1]


def test_each_mistake_changes_a_line_that_is_there():
    assert list(stale(ROOT, MUTANTS)) == []
