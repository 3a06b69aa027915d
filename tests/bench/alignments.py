"""Minimum-edit alignment and exact pairs against their plain Python forms, on the same tokens, with the same result.

`python -m bench.alignments TOKENS`: a text of so many words, cut in two ways.
"""

import json
import random
import sys

import numpy as np
from rapidfuzz.distance import Levenshtein

from bench.measure import seconds
from dskd.data.alignment import exact_pairs, minimum_edit_alignment

WORDS = 2000


def two_cuts(tokens: int) -> tuple[list[str], list[str]]:
    """About `tokens` pieces of one text on each side: words and halves of words, cut at different places."""
    rng = random.Random(0)
    letters = "etaoinshrdlucmfwypvbgkjqxz"
    words = ["".join(rng.choices(letters, range(26, 0, -1), k=rng.randint(2, 10))) for _ in range(WORDS)]
    # Words come as often as in a text: the n-th most frequent with 1/n.
    text = rng.choices(words, [1 / n for n in range(1, WORDS + 1)], k=tokens)
    sides: tuple[list[str], list[str]] = ([], [])
    for word in text:
        for side in sides:
            cut = rng.choice([0, 0, 0, rng.randint(1, len(word) - 1)])
            side += ["\u0120" + word[:cut], word[cut:]] if cut else ["\u0120" + word]
    return sides[0][:tokens], sides[1][:tokens]


def plain_alignment(teacher: list[str], student: list[str]) -> int:
    """Cost of the time-warping path, cell by cell in a matrix as FuseLLM does; the edit distance alone is compiled."""
    costs = np.full((len(student) + 1, len(teacher) + 1), np.inf)
    costs[0, 0] = 0
    for i, left in enumerate(student):
        for j, right in enumerate(teacher):
            distance = Levenshtein.distance(left.replace("\u0120", ""), right.replace("\u0120", ""))
            costs[i + 1, j + 1] = distance + min(costs[i, j], costs[i, j + 1], costs[i + 1, j])
    i, j = len(student), len(teacher)
    while i and j:  # the path back
        i, j = min((i - 1, j - 1), (i - 1, j), (i, j - 1), key=lambda cell: costs[cell])
    return int(costs[-1, -1])


def plain_pairs(teacher: list[bytes], student: list[bytes]) -> list[tuple[int, int]]:
    """Each span of one side looked for among those of the other, one by one."""

    def spans(side: list[bytes]) -> list[tuple[int, int]]:
        found, start = [], 0
        for piece in side:
            found.append((start, start + len(piece)))
            start += len(piece)
        return found

    theirs, own = spans(teacher), spans(student)
    shared = min(theirs[-1][1], own[-1][1])
    return [(i, j) for i, a in enumerate(theirs) for j, b in enumerate(own) if a == b and a[1] <= shared]


def main(tokens: int) -> None:
    teacher, student = two_cuts(tokens)
    pieces = [[piece.replace("\u0120", " ").encode() for piece in side] for side in (teacher, student)]
    assert minimum_edit_alignment(teacher, student).cost == plain_alignment(teacher, student)
    assert [tuple(pair) for pair in exact_pairs(*pieces).tolist()] == plain_pairs(*pieces)
    plain_repeats = 3 if tokens <= 512 else 1
    found = {
        "minimum_edit": seconds(lambda: minimum_edit_alignment(teacher, student), 51),
        "minimum_edit_plain": seconds(lambda: plain_alignment(teacher, student), plain_repeats),
        "exact": seconds(lambda: exact_pairs(*pieces), 51),
        "exact_plain": seconds(lambda: plain_pairs(*pieces), plain_repeats),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]))
