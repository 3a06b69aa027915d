"""Dual-space distillation with cross-model attention, for two vocabularies (arXiv 2406.17328, section 3.3)."""

import math

import torch
from torch import Tensor, nn

from dskd.config.methods import DskdCmaConfig
from dskd.losses.dual_space import DualSpace, Projected
from dskd.losses.tensors import LossOutput, MethodContext, ScaleParts, Tokens


class DskdCma(DualSpace[DskdCmaConfig]):
    """Projectors (d, D: hidden sizes of student and teacher): t2s D -> d, s2t d -> D, query 2d -> 2D."""

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

        Queries are the student's embeddings of a token and the next, keys the teacher's (equations 8 to 11). Keys and
        values of the teacher are divided by their standard deviation over the micro-batch's response tokens.
        """
        student_index = torch.cat([self.student.embed(student.inputs), self.student.embed(student.labels)], -1)
        teacher_next = self.teacher.embed(teacher.labels)
        teacher_index = torch.cat([self.teacher.embed(teacher.inputs), teacher_next], -1)
        teacher_value = normalized(teacher.hidden) + normalized(teacher_next)

        query = self.query(student_index).float() / math.sqrt(teacher_index.shape[-1])
        key = normalized(teacher_index).float()
        to_student, to_teacher = self.t2s(teacher_value).float(), self.s2t(student.hidden).float()
        t2s, s2t = [], []
        by_student = (torch.split(each, list(student.lengths)) for each in (query, to_teacher))
        by_teacher = (torch.split(each, list(teacher.lengths)) for each in (key, to_student))
        for q, v_student, k, v_teacher in zip(*by_student, *by_teacher, strict=True):
            scores = q @ k.T
            t2s.append(scores.softmax(-1) @ v_teacher)
            s2t.append(scores.T.softmax(-1) @ v_student)
        return torch.cat(t2s).to(student.hidden.dtype), torch.cat(s2t).to(student.hidden.dtype)


def normalized(states: Tensor) -> Tensor:
    """Divided by the standard deviation over all their values."""
    return states / states.std().clamp_min(torch.finfo(states.dtype).tiny) if states.numel() > 1 else states
