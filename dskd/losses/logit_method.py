"""What `kd`, `uld` and `mined` share: cross-entropy beside a distance between logits of aligned tokens."""

from typing import TypeVar

import torch
from torch import Tensor

from dskd.config.methods import TeacherMethodConfig
from dskd.losses.distances import Distance
from dskd.losses.kernels import Scales, kernels_for
from dskd.losses.method import Method, finish
from dskd.losses.response import Response, alignment_metrics
from dskd.losses.streaming import StreamedLogits, stream
from dskd.losses.tensors import LossOutput, MethodContext, ScaleParts, Sum, Tokens

L = TypeVar("L", bound=TeacherMethodConfig)


class LogitMethod(Method[L]):
    """Parts ce and kd, both over the student's response tokens.

    Attributes:
        distance_alone: the distance from the label, for tokens without a teacher's token; None: they have none.
    """

    distance_alone: Distance | None = None

    def __init__(self, settings: L, context: MethodContext) -> None:
        super().__init__(settings, context)
        self.weights = {"ce": 1 - settings.kd_rate, "kd": settings.kd_rate}

    def aligned(self, student: Tokens, teacher: Tokens) -> Tensor | None:
        """[M, 2] rows of (token of the teacher, token of the student); None: they are the same."""
        raise AssertionError(f"{type(self).__name__} has no alignment")

    @property
    def distance(self) -> Distance:
        """From the logits of the aligned token of the teacher."""
        raise AssertionError(f"{type(self).__name__} has no distance")

    def forward(self, student: Tokens, teacher: Tokens | None, scale_parts: ScaleParts) -> LossOutput:
        assert teacher is not None
        pairs = self.aligned(student, teacher)
        first, target_hidden, metrics = None, teacher.hidden, {}
        if pairs is not None:
            first, target_hidden, metrics = pairs[:, 1], teacher.hidden[pairs[:, 0]], alignment_metrics(pairs, student)
        response = Response(student, self.student.head(), self.settings.label_smoothing, self.memory_mb, first)
        streamed, target = response.streamed, StreamedLogits(target_hidden, self.teacher.head())
        scales = scale_parts(dict.fromkeys(self.weights, response.count))
        kernels = kernels_for(streamed.weight, self.distance, self.distance_alone)
        kd = torch.zeros((), device=response.labels.device)

        def take(tokens: range, distance: Distance | None, *streams: StreamedLogits) -> None:
            # A function, so that its last block is let go before other blocks, or the head's gradient, are made.
            for rows, (own, *other) in stream(tokens, self.memory_mb, kernels, *streams):
                found = kernels.measure(own, other[0] if other else None, response.terms(rows, distance))
                response.count_in(found)
                if distance is not None:
                    kd.add_(found.distance.sum())
                found.write(Scales(scales["ce"], scales["kd"]))

        aligned = len(target_hidden)
        take(range(aligned), self.distance, streamed, target)
        take(range(aligned, response.count), self.distance_alone, streamed)
        parts = {"ce": response.part, "kd": Sum(kd, response.count)}
        return finish(parts, scales, streamed.gradients(), {"accuracy": response.accuracy} | metrics)
