"""Dual-space distillation where both models share a vocabulary (arXiv 2406.17328, section 3.2)."""

from typing import Any

from torch import Tensor, nn

from dskd.losses.dual_space import DualSpace, Projected
from dskd.losses.tensors import LossOutput, Model, Scale, Tokens


class Dskd(DualSpace):
    """Projectors (d, D: hidden sizes of student and teacher): t2s D -> d, s2t d -> D."""

    masked = False

    def __init__(
        self, settings: Any, student: Model, teacher: Model | None, memory_mb: int, student_ids: Tensor | None = None
    ) -> None:
        super().__init__(settings, student, teacher, memory_mb)
        d, wide = self.student.hidden_size, self.teacher.hidden_size
        self.t2s, self.s2t = nn.Linear(wide, d), nn.Linear(d, wide)

    def forward(self, student: Tokens, teacher: Tokens | None, scale: Scale) -> LossOutput:
        assert teacher is not None
        counts = dict.fromkeys(self.weights, len(student.labels))
        t2s = Projected(self.t2s(teacher.hidden), student.labels)
        s2t = self.teacher_space(self.s2t(student.hidden), teacher.hidden, teacher.labels)
        return self.student_space(student, t2s, counts, scale(counts), s2t)
