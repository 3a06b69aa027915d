"""A mistake on purpose."""

from typing import NamedTuple


class Mutant(NamedTuple):
    name: str
    file: str
    old: str
    """Text that is in the file exactly once."""
    new: str
    tests: str
    """Files or ids of tests of which one at least must fail, separated by spaces; all are part of `make test`."""
