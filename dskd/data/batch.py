"""Samples -> tensors, padded or packed, with the response tokens of the micro-batch as flat indices."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from dskd.data.alignment import IntArray
from dskd.data.tokenization import Sample


@dataclass(frozen=True)
class Side:
    """A micro-batch for one model. B samples, S the longest, N response tokens in all, T tokens in all.

    Position p predicts the token at p + 1: `positions` are the places (in `input_ids`, flattened) whose next token is a
    response token, `labels` those next tokens. What is padding is said by `attention_mask`, never by an id.
    """

    input_ids: Tensor  # [B, S] int64; packed, one sample after the other, [1, T]
    attention_mask: Tensor  # [B, S] int64, 1 where there is a token
    positions: Tensor  # [N] int64
    inputs: Tensor  # [N] int64, the token at each position
    labels: Tensor  # [N] int64
    lengths: tuple[int, ...]  # response tokens of each sample; their sum is N
    places: Tensor | None = None  # [T] packed alone: where in B x S, flattened, each token would stand

    def to(self, device: torch.device) -> Self:
        return self.each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Self:
        return self.each(lambda tensor: tensor.pin_memory())

    def each(self, move: Callable[[Tensor], Tensor]) -> Self:
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        values |= {name: move(value) for name, value in values.items() if isinstance(value, Tensor)}
        return replace(self, **values)


@dataclass(frozen=True)
class Batch:
    """A micro-batch of both models; `teacher` is `student` itself where they share a vocabulary."""

    records: tuple[int, ...]
    """Indices of the records, for messages."""
    student: Side
    teacher: Side
    pairs: Tensor | None = None  # [M, 2] int64, response tokens aligned one to one: (teacher's, student's), each flat
    states: Tensor | None = None  # [N, D] hidden states of the teacher's response tokens, where they are stored

    def to(self, device: torch.device) -> "Batch":
        return self.each(lambda moved: moved.to(device))

    def pin_memory(self) -> "Batch":
        """Called by DataLoader, so that the copy to a GPU overlaps with computing."""
        return self.each(lambda moved: moved.pin_memory())

    def each(self, move: Callable[[Any], Any]) -> "Batch":
        student = move(self.student)
        teacher = student if self.teacher is self.student else move(self.teacher)
        pairs, states = (None if each is None else move(each) for each in (self.pairs, self.states))
        return Batch(self.records, student, teacher, pairs, states)


def flat_pairs(
    pairs: Sequence[IntArray], samples: Sequence[tuple[Sample, Sample]], teacher: Side, student: Side
) -> Tensor:
    """Aligned pairs of each sample's responses -> one-to-one pairs of the micro-batch's response tokens, [M, 2].

    Tokens that a `Side` leaves out, since nothing predicts them, have no pair. Chosen here and not by the methods: on a
    GPU its host would wait for how many there are.
    """
    found, starts = [torch.empty((0, 2), dtype=torch.int64)], torch.zeros(2, dtype=torch.int64)
    for own, (student_sample, teacher_sample), *lengths in zip(
        pairs, samples, teacher.lengths, student.lengths, strict=True
    ):
        kept = torch.tensor(lengths)
        skipped = torch.tensor([len(teacher_sample.response), len(student_sample.response)]) - kept
        shifted = torch.from_numpy(own) - skipped
        found.append(shifted[(shifted >= 0).all(1)] + starts)
        starts = starts + kept
    return one_to_one(torch.cat(found))


def one_to_one(pairs: Tensor) -> Tensor:
    """The pairs of `pairs` [M, 2] both of whose tokens are in no other."""
    alone = [(side.bincount() == 1)[side] for side in pairs.unbind(-1)]
    return pairs[alone[0] & alone[1]]


def collate(samples: Sequence[Sample], pad_id: int = 0, packed: bool = False) -> Side:
    """Pad on the right to the longest sample, or pack: put one after the other.

    A response token without anything before it (an empty prompt, no BOS) has no place that predicts it and is left out.
    """
    ends = [len(s.prompt) + len(s.response) for s in samples]
    rows, longest = len(samples), max(ends)
    mask = torch.arange(longest) < torch.tensor(ends)[:, None]
    starts = list(accumulate(ends[:-1], initial=0)) if packed else [row * longest for row in range(rows)]
    ids = torch.full((sum(ends) if packed else rows * longest,), pad_id, dtype=torch.int64)
    positions, labels, lengths = [], [], []
    for sample, begin, end in zip(samples, starts, ends, strict=True):
        start = len(sample.prompt)
        ids[begin : begin + start] = torch.from_numpy(sample.prompt)
        ids[begin + start : begin + end] = torch.from_numpy(sample.response)
        first = max(start, 1)
        positions.append(torch.arange(first - 1, end - 1) + begin)
        labels.append(ids[begin + first : begin + end])
        lengths.append(end - first)
    flat = torch.cat(positions)
    return Side(
        ids.view(1, -1) if packed else ids.view(rows, longest),
        mask.long(),
        flat,
        ids[flat],
        torch.cat(labels),
        tuple(lengths),
        mask.flatten().nonzero().squeeze(-1) if packed else None,
    )


def joined(sides: Sequence[Side]) -> Side:
    """Micro-batches as one, all padded or all packed, with their response tokens one after the other."""
    longest = longest_of(sides)
    rows = list(accumulate((len(side.lengths) for side in sides), initial=0))

    def widened(places: Tensor, side: Side, row: int) -> Tensor:
        width = side.attention_mask.shape[1]
        return (places // width + row) * longest + places % width

    together = [pad(side.attention_mask, (0, longest - side.attention_mask.shape[1])) for side in sides]
    places = [
        widened(side.places, side, row) for side, row in zip(sides, rows, strict=False) if side.places is not None
    ]
    if places:
        ids = torch.cat([side.input_ids for side in sides], dim=1)
        starts = accumulate((side.input_ids.shape[1] for side in sides), initial=0)
        positions = [side.positions + start for side, start in zip(sides, starts, strict=False)]
    else:
        ids = torch.cat([pad(side.input_ids, (0, longest - side.input_ids.shape[1])) for side in sides])
        positions = [widened(side.positions, side, row) for side, row in zip(sides, rows, strict=False)]
    inputs, labels = (torch.cat(each) for each in ([s.inputs for s in sides], [s.labels for s in sides]))
    lengths = tuple(length for side in sides for length in side.lengths)
    mask = torch.cat(together)
    return Side(ids, mask, torch.cat(positions), inputs, labels, lengths, torch.cat(places) if places else None)


def longest_of(sides: Sequence[Side]) -> int:
    return max(side.attention_mask.shape[1] for side in sides)
