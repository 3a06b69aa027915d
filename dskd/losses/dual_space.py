"""Dual-space distillation: distances in the student's space and in the teacher's (arXiv 2406.17328, section 3).

The teacher's hidden states are projected into the student's space (t2s), the student's into the teacher's (s2t), and
each side's own head then gives distributions to compare. What differs between the methods is where the projected
states come from and which token the projected teacher should predict; the loss here is the same for all.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from dskd.config.methods import DualSpaceConfig
from dskd.losses.distances import Tempered, distance
from dskd.losses.kernels import Scales, Terms, kernels_for
from dskd.losses.method import Method, finish
from dskd.losses.response import Response
from dskd.losses.streaming import StreamedLogits, stream
from dskd.losses.tensors import LossOutput, MethodContext, Sum, Tokens


class Projected(NamedTuple):
    """The teacher's hidden states in the student's space, for M of the student's tokens."""

    hidden: Tensor  # [M, d]
    labels: Tensor  # [M], what the projected teacher should predict
    tokens: Tensor | None = None  # [M], which of the student's tokens; None: all, in their order


class TeacherSpace(NamedTuple):
    """The distance in the teacher's space over K tokens; its gradient is not scaled yet."""

    streamed: StreamedLogits
    value: Tensor  # scalar
    correct: Tensor  # scalar, tokens that the projected student predicts right
    predictions: Tensor | None  # [K], the teacher's own, where only some count


D = TypeVar("D", bound=DualSpaceConfig)


class DualSpace(Method[D]):
    """Base of the dual-space methods: parts ce, t2s_ce, t2s_kd and s2t_kd."""

    masked = True
    """Whether only tokens where the projected teacher predicts its label count in t2s_kd (equation 7)."""

    def __init__(self, settings: D, context: MethodContext) -> None:
        super().__init__(settings, context)
        rate = settings.kd_rate
        self.weights = {"ce": 1 - rate, "t2s_ce": rate, "t2s_kd": rate, "s2t_kd": rate}
        self.distance = distance(settings)
        self.s2t_distance = Tempered("forward_kl", settings.temperature)

    def teacher_space(
        self, s2t_hidden: Tensor, teacher_hidden: Tensor, labels: Tensor, held: Tensor | None = None
    ) -> TeacherSpace:
        """Distance of the projected student [K, D] from the teacher [K, D], through the teacher's head.

        With `held` [V] bool, only tokens where the teacher predicts one of these count.
        """
        head = self.teacher.head()
        streamed, target = StreamedLogits(s2t_hidden, head, overwrite=True), StreamedLogits(teacher_hidden, head)
        total, correct = torch.zeros(2, device=labels.device)
        predictions = None if held is None else torch.empty_like(labels)
        kernels = kernels_for(head.weight, self.s2t_distance)
        for rows, (projected, teacher) in stream(range(len(labels)), self.memory_mb, kernels, streamed, target):
            wanted = Terms(labels[rows], cross_entropy=False, distance=self.s2t_distance, predictions=held is not None)
            found, learn = kernels.measure(projected, teacher, wanted), None
            correct += found.correct.sum()
            if held is not None and predictions is not None:
                predictions[rows] = found.predictions
                learn = held[found.predictions].float()
            total += found.distance.sum() if learn is None else found.distance @ learn
            found.write(Scales(learn=learn))
        return TeacherSpace(streamed, total, correct, predictions)

    def student_space(
        self, student: Tokens, t2s: Projected, counts: Mapping[str, int], scales: Mapping[str, float], s2t: TeacherSpace
    ) -> LossOutput:
        """All parts together; `counts` are the tokens that each is over."""
        head, projected = self.student.head(), len(t2s.labels)
        response = Response(student, head, self.settings.label_smoothing, self.memory_mb, t2s.tokens)
        target = StreamedLogits(t2s.hidden, head, overwrite=True)  # the head takes no gradient from projected states
        t2s_ce, t2s_kd, t2s_correct = self.learn_projected(response, target, t2s.labels, scales)
        response.learn_alone(range(projected, response.count), scales["ce"])
        sums = {"ce": response.ce, "t2s_ce": t2s_ce, "t2s_kd": t2s_kd, "s2t_kd": s2t.value}
        parts = {name: Sum(value, counts[name]) for name, value in sums.items()}
        metrics = {
            "accuracy": response.accuracy,
            "t2s_accuracy": Sum(t2s_correct, projected),
            "s2t_accuracy": Sum(s2t.correct, len(s2t.streamed.hidden)),
        }
        gradients = response.streamed.gradients() + target.gradients() + s2t.streamed.gradients(scales["s2t_kd"])
        return finish(parts, scales, gradients, metrics)

    def learn_projected(
        self, response: Response, target: StreamedLogits, labels: Tensor, scales: Mapping[str, float]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Take the first tokens of the response with the projected teacher's beside them.

        Returns sums: cross-entropy of the projected teacher, distance from it, and tokens that it predicts right.
        """
        ce, kd, correct = torch.zeros(3, device=labels.device)
        streamed = response.streamed
        kernels = kernels_for(streamed.weight, self.distance)
        for rows, (own, other) in stream(range(len(labels)), self.memory_mb, kernels, streamed, target):
            wanted = replace(response.terms(rows, self.distance), predictions=True, teacher_labels=labels[rows])
            found = kernels.measure(own, other, wanted)
            response.count_in(found)
            right = found.predictions.eq(labels[rows]).float()
            correct += right.sum()
            learn = right if self.masked else torch.ones_like(right)
            kd += found.distance @ learn
            ce += found.teacher_ce.sum()
            found.write(Scales(scales["ce"], scales["t2s_kd"], learn, scales["t2s_ce"]))
        return ce, kd, correct
