"""What `kd`, `uld` and `mined` share: cross-entropy beside a distance between logits of aligned tokens."""

from typing import TypeVar

import torch
from torch import Tensor

from dskd.config.methods import TeacherMethodConfig
from dskd.losses.method import Method, finish
from dskd.losses.response import Response, alignment_metrics
from dskd.losses.streaming import StreamedLogits, stream
from dskd.losses.tensors import LossOutput, MethodContext, ScaleParts, Sum, Tokens

L = TypeVar("L", bound=TeacherMethodConfig)


class LogitMethod(Method[L]):
    """Parts ce and kd, both over the student's response tokens."""

    def __init__(self, settings: L, context: MethodContext) -> None:
        super().__init__(settings, context)
        self.weights = {"ce": 1 - settings.kd_rate, "kd": settings.kd_rate}

    def aligned(self, student: Tokens, teacher: Tokens) -> Tensor | None:
        """[M, 2] rows of (token of the teacher, token of the student); None: they are the same."""
        raise AssertionError(f"{type(self).__name__} has no alignment")

    def distance(self, logits: Tensor, teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
        """Distance [n] of logits [n, V] from the teacher's, and its gradient [n, V], which may be narrower."""
        raise AssertionError(f"{type(self).__name__} has no distance")

    def distance_from_label(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor] | None:
        """The same for tokens without a teacher's token; None: they have none."""
        return None

    def forward(self, student: Tokens, teacher: Tokens | None, scale_parts: ScaleParts) -> LossOutput:
        assert teacher is not None
        pairs = self.aligned(student, teacher)
        first, target_hidden, metrics = None, teacher.hidden, {}
        if pairs is not None:
            first, target_hidden, metrics = pairs[:, 1], teacher.hidden[pairs[:, 0]], alignment_metrics(pairs, student)
        response = Response(student, self.student.head(), self.settings.label_smoothing, first)
        streamed, target = response.streamed, StreamedLogits(target_hidden, self.teacher.head())
        scales = scale_parts(dict.fromkeys(self.weights, response.count))
        kd = torch.zeros((), device=response.labels.device)

        def keep(rows: slice, logits: Tensor, distilled: tuple[Tensor, Tensor] | None) -> None:
            grad = response.gradient(rows, logits, scales["ce"])
            if distilled is not None:
                value, kd_grad = distilled
                kd.add_(value.sum())
                grad[:, : kd_grad.shape[-1]].add_(kd_grad, alpha=scales["kd"])
            streamed.keep_gradient(logits, grad)

        aligned = len(target_hidden)
        for rows, (logits, teacher_logits) in stream(range(aligned), self.memory_mb, streamed, target):
            keep(rows, logits, self.distance(logits, teacher_logits))
        for rows, (logits,) in stream(range(aligned, response.count), self.memory_mb, streamed):
            keep(rows, logits, self.distance_from_label(logits, response.labels[rows]))
        parts = {"ce": response.part, "kd": Sum(kd, response.count)}
        return finish(parts, scales, streamed.gradients(), {"accuracy": response.accuracy} | metrics)
