"""The batches of a run: a pure function of (seed, step, rank, world size, global batch). Resuming needs no state."""

from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dskd.config.errors import UserError
from dskd.data.alignment import Align, IntArray
from dskd.data.batch import Batch, collate, flat_pairs
from dskd.data.budget import Budget, Lengths
from dskd.data.records import Record
from dskd.data.tokenization import Limits, Sample, Tokenizer, tokenize

T = TypeVar("T")
ReadStates = Callable[[Sequence[Sample]], Tensor]
"""The teacher's side of B records -> its hidden states [N, D] at their response tokens, from where they are stored."""


@dataclass(frozen=True)
class Plan:
    """Which records each micro-batch holds.

    A step's global batch is cut into micro-batches, and rank r takes every world_size-th of them. Within the global
    batch, records of like length stand together: less padding, and ranks that work at the same time have equally much
    to do. Micro-batches of so many records do not depend on the number of ranks, those of so many tokens do.
    """

    sizes: Sequence[int]
    """Length of each record in characters."""
    seed: int
    global_batch_size: int
    micro_batch_size: int
    budget: Budget | None = None
    """Takes the place of `micro_batch_size` where micro-batches are of so many tokens."""

    @property
    def steps_per_epoch(self) -> int:
        return len(self.sizes) // self.global_batch_size

    def global_batch(self, step: int) -> list[int]:
        """Record indices of optimizer step `step` (from 0), ordered by length."""
        epoch, within = divmod(step, self.steps_per_epoch)
        order = permutation(self.seed, epoch, len(self.sizes))
        batch = order[within * self.global_batch_size : (within + 1) * self.global_batch_size].tolist()
        return sorted(batch, key=lambda index: (self.sizes[index], index))

    def micro_batches(self, step: int, rank: int, world_size: int) -> list[list[int]]:
        """Record indices of each micro-batch that `rank` runs in `step`."""
        return self.micro_batches_of(self.global_batch(step), rank, world_size)

    def micro_batches_of(self, batch: Sequence[int], rank: int, world_size: int) -> list[list[int]]:
        """The same of a global batch whose records are ordered by length."""
        size = self.micro_batch_size
        if self.budget is None:
            parts = [batch[i : i + size] for i in range(0, len(batch), size)]
        else:
            lengths = self.budget.lengths
            parts = self.budget.cut(sorted(batch, key=lambda index: (max(lengths(index)), index)), world_size)
        return [list(part) for part in parts[rank::world_size]]


@lru_cache(maxsize=1)
def permutation(seed: int, epoch: int, count: int) -> IntArray:
    """The order of `count` records in an epoch; that of the last one is kept, since a step uses a small part of it."""
    order = np.random.default_rng((seed, epoch)).permutation(count)
    order.setflags(write=False)
    return order


class Recent(Generic[T]):
    """What was made for the last `size` indices that were asked for."""

    def __init__(self, size: int = 8192) -> None:
        self.size = size
        self.made: OrderedDict[int, T] = OrderedDict()

    def get(self, index: int, make: Callable[[int], T]) -> T:
        if index not in self.made:
            self.made[index] = make(index)
        self.made.move_to_end(index)
        if len(self.made) > self.size:
            self.made.popitem(last=False)
        return self.made[index]


@dataclass
class Collator:
    """Record indices -> Batch, in a worker process: tokenizes with both tokenizers, each record once in a while."""

    records: Sequence[Record]
    student: Tokenizer
    teacher: Tokenizer | None
    """None where there is no teacher, or it shares the student's vocabulary."""
    limits: Limits
    align: Align | None = None
    """Pairs the tokens of both sides' responses, where the method asks for it."""
    read_states: ReadStates | None = None
    """Reads the teacher's hidden states, where they are stored."""
    packed: bool = False
    """Whether records follow one another without padding."""
    samples: Recent[tuple[Sample, Sample]] = field(default_factory=Recent)
    """What this process has tokenized last, for student and teacher."""
    pairs: Recent[IntArray] = field(default_factory=Recent)
    """And aligned."""

    def __post_init__(self) -> None:
        self.known = np.zeros((len(self.records), 2), np.int32)  # lengths; 8 MB for a million records, once in use

    def __call__(self, indices: Sequence[int]) -> Batch:
        samples = [self.sample(index) for index in indices]
        student = collate([own for own, _ in samples], packed=self.packed)
        teacher = student if self.teacher is None else collate([other for _, other in samples], packed=self.packed)
        pairs = None if self.align is None else flat_pairs([self.pair(i) for i in indices], samples, teacher, student)
        states = None if self.read_states is None else self.read_states([other for _, other in samples])
        return Batch(tuple(indices), student, teacher, pairs, states)

    def sample(self, index: int) -> tuple[Sample, Sample]:
        return self.samples.get(index, self.tokenized)

    def tokenized(self, index: int) -> tuple[Sample, Sample]:
        record = self.records[index]
        student = tokenize(self.student, record, self.limits)
        return student, student if self.teacher is None else tokenize(self.teacher, record, self.limits)

    def lengths(self, index: int) -> Lengths:
        """Tokens of a record for student and teacher; this process tokenizes it for them once in a run."""
        if not self.known[index, 0]:
            self.known[index] = [len(each.prompt) + len(each.response) for each in self.sample(index)]
        student, teacher = self.known[index].tolist()
        return student, teacher

    def pair(self, index: int) -> IntArray:
        return self.pairs.get(index, self.aligned)

    def aligned(self, index: int) -> IntArray:
        assert self.align is not None
        student, teacher = self.sample(index)
        return self.align(teacher.response.tolist(), student.response.tolist())


class Steps(Dataset[list[Batch] | UserError]):
    """Item k: the micro-batches of one rank in step k, or the mistake that was met: raised, torch would wrap it."""

    def __init__(self, plan: Plan, collator: Collator, rank: int, world_size: int) -> None:
        self.plan, self.collator, self.rank, self.world_size = plan, collator, rank, world_size

    def __getitem__(self, step: int) -> list[Batch] | UserError:
        try:
            return [self.collator(indices) for indices in self.plan.micro_batches(step, self.rank, self.world_size)]
        except UserError as error:
            return error


def load_steps(
    steps: Steps,
    first: int,
    last: int,
    workers: int,
    pin_memory: bool,
    begin_worker: Callable[[int], None] | None = None,
) -> Generator[list[Batch]]:
    """The micro-batches of steps first..last-1, made ahead by `workers` processes that live until the generator ends.

    Each of them calls `begin_worker` with its number first. Raises `UserError` where the records were changed.
    """
    order = range(first, last)
    loader = DataLoader(
        steps,
        batch_size=None,
        sampler=order,
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=begin_worker,
        generator=torch.Generator(),  # else a loader's start would draw from the generator that dropout draws from
    )
    batches = iter(loader)
    try:
        for found in batches:
            if isinstance(found, UserError):
                raise found
            yield found
    finally:
        # At the end of the process they would be waited for, however it ends; they end only when they are told to.
        if workers:
            batches._shutdown_workers()  # type: ignore[attr-defined]


def evaluation_batches(collator: Collator, size: int, rank: int, world_size: int) -> Iterator[tuple[Batch, bool]]:
    """All records, split over the ranks in batches of `size`, each with whether it counts.

    Every rank gets the same number of batches, since under ZeRO-3 all must run each forward; a rank that has run out
    repeats its first records, which do not count.
    """
    order = sorted(range(len(collator.records)), key=lambda i: (len(collator.records[i].prompt), i))
    batches = [order[i : i + size] for i in range(0, len(order), size)]
    for round_ in range(-(-len(batches) // world_size)):
        index = round_ * world_size + rank
        counts = index < len(batches)
        yield collator(batches[index] if counts else batches[0]), counts
