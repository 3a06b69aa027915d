"""Cross-entropy on the response: supervised fine-tuning, and the dev loss of every method."""

from typing import Any

import torch
from torch import Tensor

from dskd.losses.cross_entropy import cross_entropy, predicts
from dskd.losses.method import Method, finish
from dskd.losses.streaming import StreamedLogits, stream
from dskd.losses.tensors import LossOutput, Model, Scale, Sum, Tokens


class Sft(Method):
    """-log p(response token), arXiv 2406.17328, equation 1."""

    def __init__(
        self, settings: Any, student: Model, teacher: Model | None, memory_mb: int, student_ids: Tensor | None = None
    ) -> None:
        super().__init__(settings, student, teacher, memory_mb)
        self.weights = {"ce": 1.0}

    def forward(self, student: Tokens, teacher: Tokens | None, scale: Scale) -> LossOutput:
        count = len(student.labels)
        scales = scale({"ce": count})
        streamed = StreamedLogits(student.hidden, self.student.head(), grad_head=True)
        ce, correct = torch.zeros(2, device=student.hidden.device)
        for rows, (logits,) in stream(range(count), self.memory_mb, streamed):
            labels = student.labels[rows]
            correct += predicts(logits, labels).sum()
            value, grad = cross_entropy(logits, labels, self.settings.label_smoothing)
            ce += value.sum()
            streamed.keep_gradient(logits, grad.mul_(scales["ce"]))
        return finish({"ce": Sum(ce, count)}, scales, streamed.gradients(), {"accuracy": Sum(correct, count)})
