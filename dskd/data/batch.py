"""Samples -> padded tensors, with the response tokens of the micro-batch as flat indices."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor

from dskd.data.alignment import IntArray
from dskd.data.tokenization import Sample


@dataclass(frozen=True)
class Side:
    """A micro-batch for one model. B samples, S the longest, N response tokens in all.

    Position p predicts the token at p + 1: `positions` are the places (in B x S, flattened) whose next token is a
    response token, `labels` those next tokens. What is padding is said by `attention_mask`, never by an id.
    """

    input_ids: Tensor  # [B, S] int64
    attention_mask: Tensor  # [B, S] int64, 1 where there is a token
    positions: Tensor  # [N] int64
    inputs: Tensor  # [N] int64, the token at each position
    labels: Tensor  # [N] int64
    lengths: tuple[int, ...]  # response tokens of each sample; their sum is N

    def to(self, device: torch.device) -> Self:
        moved = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "lengths"}
        return replace(self, **{name: tensor.to(device, non_blocking=True) for name, tensor in moved.items()})

    def pin_memory(self) -> Self:
        pinned = {f.name: getattr(self, f.name).pin_memory() for f in fields(self) if f.name != "lengths"}
        return replace(self, **pinned)


@dataclass(frozen=True)
class Batch:
    """A micro-batch of both models; `teacher` is `student` itself where they share a vocabulary."""

    records: tuple[int, ...]
    """Indices of the records, for messages."""
    student: Side
    teacher: Side
    pairs: Tensor | None = None  # [M, 2] int64, aligned response tokens: (of the teacher, of the student), each flat
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
    """Aligned pairs of each sample's responses -> pairs of the micro-batch's response tokens, [M, 2].

    Tokens that a `Side` leaves out, since nothing predicts them, have no pair.
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
    return torch.cat(found)


def collate(samples: Sequence[Sample], pad_id: int = 0) -> Side:
    """Pad on the right to the longest sample.

    A response token without anything before it (an empty prompt, no BOS) has no place that predicts it and is left out.
    """
    longest = max(len(s.prompt) + len(s.response) for s in samples)
    input_ids = torch.full((len(samples), longest), pad_id, dtype=torch.int64)
    attention_mask = torch.zeros((len(samples), longest), dtype=torch.int64)
    positions, labels, lengths = [], [], []
    for row, sample in enumerate(samples):
        start, end = len(sample.prompt), len(sample.prompt) + len(sample.response)
        input_ids[row, :start] = torch.from_numpy(sample.prompt)
        input_ids[row, start:end] = torch.from_numpy(sample.response)
        attention_mask[row, :end] = 1
        first = max(start, 1)
        positions.append(torch.arange(first - 1, end - 1) + row * longest)
        labels.append(input_ids[row, first:end])
        lengths.append(end - first)
    flat = torch.cat(positions)
    return Side(input_ids, attention_mask, flat, input_ids.flatten()[flat], torch.cat(labels), tuple(lengths))
