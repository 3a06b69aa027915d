"""Dual-space distillation with cross-model attention, for two vocabularies (arXiv 2406.17328, section 3.3)."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from dskd.config.methods import DskdCmaConfig
from dskd.losses.dual_space import DualSpace, Projected
from dskd.losses.tensors import LossOutput, MethodContext, ScaleParts, Tokens

GROUP_BYTES = 32
"""Of a token, for each number in the hidden states of both sides: what the backward pass has of a group at a time."""


class DskdCma(DualSpace[DskdCmaConfig]):
    """Projectors (d, D: hidden sizes of student and teacher): t2s D -> d, s2t d -> D, query 2d -> 2D.

    Keys and values of the teacher are divided by their standard deviation over the response tokens of the micro-batch;
    after `look_ahead` over those of the global batch, so that it does not matter how that is cut.
    """

    looks_ahead = True
    deviations: Tensor | None = None

    def __init__(self, settings: DskdCmaConfig, context: MethodContext) -> None:
        super().__init__(settings, context)
        d, wide = self.student.hidden_size, self.teacher.hidden_size
        self.t2s, self.s2t, self.query = nn.Linear(wide, d), nn.Linear(d, wide), nn.Linear(2 * d, 2 * wide)

    def forward(self, student: Tokens, teacher: Tokens | None, scale_parts: ScaleParts) -> LossOutput:
        assert teacher is not None
        # Both sides' sums are divided by the student's tokens.
        counts = dict.fromkeys(self.weights, len(student.labels))
        t2s_hidden, s2t_hidden = self.cross_attention(student, teacher)
        s2t = self.teacher_space(s2t_hidden, teacher.hidden, teacher.labels)
        return self.student_space(student, Projected(t2s_hidden, student.labels), counts, scale_parts(counts), s2t)

    def cross_attention(self, student: Tokens, teacher: Tokens) -> tuple[Tensor, Tensor]:
        """Teacher states at the student's tokens [N_s, d], and student states at the teacher's tokens [N_t, D].

        Of what it takes to make them nothing is kept: the backward pass makes it again, a group of records at a time.
        Gradients of the projectors are summed over the groups in their own type, as a large head's are over chunks.
        """
        # Looked up once: under ZeRO-3 that is a collective call, and ranks have other numbers of groups.
        embedded = torch.cat([self.student.embed(student.inputs), self.student.embed(student.labels)], -1)
        deviations = self.deviations
        if deviations is None:
            deviations = torch.stack([deviation(each) for each in self.teacher_states(teacher)])
        room = self.memory_mb * 2**20 // (GROUP_BYTES * (self.student.hidden_size + self.teacher.hidden_size))
        groups = grouped(list(map(max, student.lengths, teacher.lengths)), room)
        own, other = cut(student, groups), cut(teacher, groups)
        indices = torch.split(embedded, [len(each.labels) for each in own])
        found = [
            checkpoint(self.attend, *each, deviations, use_reentrant=False, preserve_rng_state=False)
            for each in zip(own, other, indices, strict=True)
        ]
        t2s, s2t = zip(*found, strict=True)
        return torch.cat(t2s), torch.cat(s2t)

    def attend(self, student: Tokens, teacher: Tokens, index: Tensor, deviations: Tensor) -> tuple[Tensor, Tensor]:
        """The same of some records; `index` [N_s, 2d] holds the student's embeddings of a token and the next.

        These are the queries, and the teacher's the keys (equations 8 to 11).
        """
        query, (key, teacher_value) = project(self.query, index), self.keys_and_values(teacher, deviations)
        to_student, to_teacher = project(self.t2s, teacher_value), project(self.s2t, student.hidden)
        t2s, s2t = [], []
        by_student = (torch.split(each, list(student.lengths)) for each in (query, to_teacher))
        by_teacher = (torch.split(each, list(teacher.lengths)) for each in (key, to_student))
        for record in zip(*by_student, *by_teacher, strict=True):
            q, v_student, k, v_teacher = (each.float() for each in record)
            scores = q / math.sqrt(k.shape[-1]) @ k.T
            t2s.append((scores.softmax(-1) @ v_teacher).to(student.hidden.dtype))
            s2t.append((scores.T.softmax(-1) @ v_student).to(student.hidden.dtype))
        return torch.cat(t2s), torch.cat(s2t)

    def keys_and_values(self, teacher: Tokens, deviations: Tensor) -> tuple[Tensor, Tensor]:
        """Of the teacher's tokens: keys [N_t, 2D], and values [N_t, D]."""
        states = self.teacher_states(teacher)
        hidden, following, index = (each / by.to(each.dtype) for each, by in zip(states, deviations, strict=True))
        return index, hidden + following

    def teacher_states(self, teacher: Tokens) -> tuple[Tensor, Tensor, Tensor]:
        """What is divided by its deviation: hidden states, embeddings of next tokens, and of tokens and the next."""
        following = self.teacher.embed(teacher.labels)
        return teacher.hidden, following, torch.cat([self.teacher.embed(teacher.inputs), following], -1)

    def start_step(self) -> None:
        self.deviations = None

    @torch.no_grad()
    def look_ahead(self, teachers: Sequence[Tokens], over_ranks: Callable[[Tensor], Tensor]) -> None:
        own = torch.zeros(3, 3, dtype=torch.float64, device=teachers[0].hidden.device)
        for teacher in teachers:
            own += torch.stack([moments(each) for each in self.teacher_states(teacher)])
        count, total, squares = over_ranks(own).unbind(-1)
        variance = (squares - total.square() / count) / (count - 1).clamp_min(1)
        self.deviations = variance.sqrt().clamp_min(torch.finfo(teachers[0].hidden.dtype).tiny)


def project(projector: nn.Linear, states: Tensor) -> Tensor:
    """As the module does it, but for its hooks.

    Under ZeRO-3 each call is collective, and ranks have other numbers of groups; without one, the weights are whole in
    all of the method's forward and backward pass, as those of the heads are.
    """
    return functional.linear(states, projector.weight, projector.bias)


def grouped(lengths: Sequence[int], most: int) -> list[slice]:
    """Neighbours that go together: as many records as have at most `most` tokens, but at least one."""
    starts, tokens = [0], 0
    for record, length in enumerate(lengths):
        tokens += length
        if tokens > most and record > starts[-1]:
            starts.append(record)
            tokens = length
    return [slice(*ends) for ends in pairwise([*starts, len(lengths)])]


def cut(tokens: Tokens, groups: Sequence[slice]) -> list[Tokens]:
    lengths = [tokens.lengths[group] for group in groups]
    columns = (torch.split(each, [sum(group) for group in lengths]) for each in tokens[:3])
    return [Tokens(*parts) for parts in zip(*columns, lengths, strict=True)]


def deviation(states: Tensor) -> Tensor:
    """The standard deviation over all values; 1 where there are too few for one."""
    return states.std().clamp_min(torch.finfo(states.dtype).tiny) if states.numel() > 1 else states.new_ones(())


def moments(states: Tensor) -> Tensor:
    """[3]: how many values there are, their sum and that of their squares, in fp64."""
    squares = torch.linalg.vector_norm(states, dtype=torch.float64).square()
    return torch.stack([squares.new_tensor(states.numel()), states.sum(dtype=torch.float64), squares])
