"""Vanilla distillation: the distance between both models' distributions over one shared vocabulary."""

import torch

from dskd.config.methods import KdConfig
from dskd.losses.divergence import distance
from dskd.losses.method import Method
from dskd.losses.sft import cross_entropy
from dskd.losses.streaming import StreamedLogits, attach_gradients, chunks
from dskd.losses.tensors import LossOutput, Model, Sum, Tokens


class Kd(Method):
    """Distillation of logits (arXiv 2406.17328, equation 2).

    Where one head is padded wider than the other, the distance is taken over the columns that both have; the
    cross-entropy is over the student's whole head.
    """

    def __init__(self, settings: KdConfig, student: Model, teacher: Model | None, memory_mb: int) -> None:
        super().__init__(settings, student, teacher, memory_mb)
        self.weights = {"ce": 1 - settings.kd_rate, "kd": settings.kd_rate}
        self.distance = distance(settings)

    def forward(self, student: Tokens, teacher: Tokens | None, scales: dict[str, float]) -> LossOutput:
        assert teacher is not None
        width = min(self.student.vocab_size, self.teacher.vocab_size)
        streamed = StreamedLogits(student.hidden, self.student.head(), grad_head=True)
        target = StreamedLogits(teacher.hidden, self.teacher.head(), grad_hidden=False)
        ce, kd, correct = torch.zeros(3, device=student.hidden.device)
        with torch.no_grad():
            for rows in chunks(len(student.labels), self.memory_mb, [4 * self.student.vocab_size, 3 * width]):
                logits, labels = streamed.logits(rows), student.labels[rows]
                value, grad = cross_entropy(logits, labels)
                ce += value.sum()
                correct += logits.argmax(-1).eq(labels).sum()
                value, kd_grad = self.distance(logits[:, :width], target.logits(rows)[:, :width])
                kd += value.sum()
                grad.mul_(scales["ce"])[:, :width].add_(kd_grad, alpha=scales["kd"])
                streamed.backward(rows, grad, logits)
        parts = {"ce": ce, "kd": kd}
        loss = attach_gradients(self.scaled(parts, scales), streamed.gradients(student.hidden))
        return LossOutput(loss, parts, {"accuracy": Sum(correct, len(student.labels))})
