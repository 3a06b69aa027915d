"""Suites of evaluations: sets of records by name, and where their files lie."""

from collections.abc import Iterable
from pathlib import Path

from dskd.config.errors import UserError
from dskd.config.names import unknown

SUITES = {
    "paper": {
        "dolly": "dolly/valid.jsonl",
        "self-inst": "self-inst/valid.jsonl",
        "vicuna": "vicuna/valid.jsonl",
        "sinst": "sinst/11_/valid.jsonl",
        "uinst": "uinst/11_/valid.jsonl",
    }
}
"""Files by set, relative to the folder of them all: the names that the paper's authors gave them."""
NamedFile = tuple[str, Path]
"""What an evaluation is called, and its records."""


def suite_files(suite: str, root: Path) -> list[NamedFile]:
    """The files of a suite. Raises `UserError` for an unknown one."""
    if suite not in SUITES:
        raise UserError(f"suite: {suite!r}: {unknown('suite', suite, SUITES)}")
    return [(name, root / file) for name, file in SUITES[suite].items()]


def named_files(files: Iterable[Path]) -> list[NamedFile]:
    """Files on their own are called by their names."""
    return [(file.stem, file) for file in files]
