"""Plain forms that more than one test compares fast code with."""

from collections.abc import Sequence


def edit_distance(left: Sequence[object], right: Sequence[object]) -> int:
    """Levenshtein distance of two texts or byte strings, cell by cell."""
    above = list(range(len(right) + 1))
    for i, a in enumerate(left, 1):
        row = [i]
        for j, b in enumerate(right, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (a != b)))
        above = row
    return above[-1]
