"""What `kd`, `uld` and `mined` share: cross-entropy beside a distance between logits of aligned tokens."""

from typing import Any

import torch
from torch import Tensor

from dskd.losses.cross_entropy import cross_entropy, predicts
from dskd.losses.method import Method, finish
from dskd.losses.streaming import StreamedLogits, stream
from dskd.losses.tensors import LossOutput, Model, Scale, Sum, Tokens


class LogitMethod(Method):
    """Parts ce and kd, both over the student's response tokens."""

    def __init__(
        self, settings: Any, student: Model, teacher: Model | None, memory_mb: int, student_ids: Tensor | None = None
    ) -> None:
        super().__init__(settings, student, teacher, memory_mb)
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

    def forward(self, student: Tokens, teacher: Tokens | None, scale: Scale) -> LossOutput:
        assert teacher is not None
        count = len(student.labels)
        scales = scale(dict.fromkeys(self.weights, count))
        pairs = self.aligned(student, teacher)
        hidden, labels, target_hidden = student.hidden, student.labels, teacher.hidden
        if pairs is not None:
            order = student_order(pairs[:, 1], count)
            hidden, labels, target_hidden = hidden[order], labels[order], target_hidden[pairs[:, 0]]
        streamed = StreamedLogits(hidden, self.student.head(), grad_head=True)
        target = StreamedLogits(target_hidden, self.teacher.head())
        ce, kd, correct = torch.zeros(3, device=labels.device)

        def keep(rows: slice, logits: Tensor, distilled: tuple[Tensor, Tensor] | None) -> None:
            nonlocal ce, kd, correct
            own = labels[rows]
            correct += predicts(logits, own).sum()
            value, grad = cross_entropy(logits, own, self.settings.label_smoothing)
            ce += value.sum()
            grad.mul_(scales["ce"])
            if distilled is not None:
                value, kd_grad = distilled
                kd += value.sum()
                grad[:, : kd_grad.shape[-1]].add_(kd_grad, alpha=scales["kd"])
            streamed.keep_gradient(logits, grad)

        for rows, (logits, teacher_logits) in stream(range(len(target_hidden)), self.memory_mb, streamed, target):
            keep(rows, logits, self.distance(logits, teacher_logits))
        for rows, (logits,) in stream(range(len(target_hidden), count), self.memory_mb, streamed):
            keep(rows, logits, self.distance_from_label(logits, labels[rows]))
        parts = {"ce": Sum(ce, count), "kd": Sum(kd, count)}
        metrics = {"accuracy": Sum(correct, count)}
        if pairs is not None:
            metrics |= alignment_metrics(pairs, student)
        return finish(parts, scales, streamed.gradients(), metrics)


def student_order(first: Tensor, tokens: int) -> Tensor:
    """All `tokens`, those of `first` before the others, which cost nothing but their cross-entropy then."""
    others = torch.ones(tokens, dtype=torch.bool, device=first.device)
    others[first] = False
    return torch.cat([first, others.nonzero().squeeze(-1)])


def alignment_metrics(pairs: Tensor, student: Tokens) -> dict[str, Sum]:
    """The share of the student's tokens that are aligned, and of its samples without any that is."""
    ends = torch.tensor(student.lengths, device=pairs.device).cumsum(0)
    reached = int((torch.bincount(torch.bucketize(pairs[:, 1].contiguous(), ends, right=True)) > 0).sum())
    count, samples = len(student.labels), len(student.lengths)
    zero = torch.zeros((), device=pairs.device)
    return {
        "aligned_tokens": Sum(zero + len(pairs), count),
        "samples_without_alignment": Sum(zero + (samples - reached), samples),
    }
