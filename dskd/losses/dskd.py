"""Dual-space distillation where both models share a vocabulary (arXiv 2406.17328, section 3.2)."""

from torch import nn

from dskd.config.methods import DskdConfig
from dskd.losses.dual_space import DualSpace, Projected
from dskd.losses.tensors import LossOutput, MethodContext, ScaleParts, Tokens


class Dskd(DualSpace[DskdConfig]):
    """Projectors (d, D: hidden sizes of student and teacher): t2s D -> d, s2t d -> D."""

    masked = False

    def __init__(self, settings: DskdConfig, context: MethodContext) -> None:
        super().__init__(settings, context)
        d, wide = self.student.hidden_size, self.teacher.hidden_size
        self.t2s, self.s2t = nn.Linear(wide, d), nn.Linear(d, wide)

    def forward(self, student: Tokens, teacher: Tokens | None, scale_parts: ScaleParts) -> LossOutput:
        assert teacher is not None
        counts = dict.fromkeys(self.weights, len(student.labels))
        t2s = Projected(self.t2s(teacher.hidden), student.labels)
        s2t = self.teacher_space(self.s2t(student.hidden), teacher.hidden, teacher.labels)
        return self.student_space(student, t2s, counts, scale_parts(counts), s2t)
