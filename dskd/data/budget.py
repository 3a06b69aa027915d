"""Micro-batches of a number of tokens: where a global batch is cut, so that ranks have equally much to do."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

Lengths = tuple[int, int]
"""Tokens of a record, prompt and response, for student and teacher."""


@dataclass(frozen=True)
class Budget:
    """How many tokens a micro-batch may have, and how they are counted."""

    tokens: int
    """The most on each side; no record has more."""
    lengths: Callable[[int], Lengths]
    """Of the record with an index."""
    packed: bool = False
    """Whether padding is left out, and so does not count."""

    def cut(self, records: Sequence[int], ranks: int) -> list[Sequence[int]]:
        """The micro-batches of a global batch, each of at most `tokens`: equally many for each of `ranks`.

        Neighbours stand together, and the largest is as small as it can be. `records` must divide over the ranks.
        """
        lengths = [self.lengths(record) for record in records]
        least = len(filled(lengths, self.tokens, self.packed))
        count = -(-least // ranks) * ranks
        low, high = max(map(max, lengths)), self.tokens
        while low < high:
            middle = (low + high) // 2
            if len(filled(lengths, middle, self.packed)) <= count:
                high = middle
            else:
                low = middle + 1
        cuts = filled(lengths, low, self.packed)
        while len(cuts) < count:
            cuts = halved(cuts)
        return [records[part.start : part.stop] for part in cuts]


def filled(lengths: Sequence[Lengths], most: int, packed: bool) -> list[range]:
    """Neighbours that together have at most `most` tokens on each side: as few parts as possible."""
    cuts: list[range] = []
    start, sums, longest = 0, (0, 0), 0
    for index, own in enumerate(lengths):
        together, width = (sums[0] + own[0], sums[1] + own[1]), max(longest, *own)
        if (max(together) if packed else width * (index + 1 - start)) > most and index > start:
            cuts.append(range(start, index))
            start, together, width = index, own, max(own)
        sums, longest = together, width
    return [*cuts, range(start, len(lengths))]


def halved(cuts: Sequence[range]) -> list[range]:
    """The part of most records in two, so that there is one part more."""
    at = max(range(len(cuts)), key=lambda i: len(cuts[i]))
    part = cuts[at]
    middle = part.start + len(part) // 2
    return [*cuts[:at], range(part.start, middle), range(middle, part.stop), *cuts[at + 1 :]]
