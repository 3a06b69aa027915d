"""Cross-entropy on the response: supervised fine-tuning, and the dev loss of every method."""

import torch
from torch import Tensor

from dskd.config.methods import SftConfig
from dskd.losses.method import Method
from dskd.losses.streaming import StreamedLogits, attach_gradients, chunks
from dskd.losses.tensors import LossOutput, Model, Sum, Tokens


def cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy [n] of logits [n, V], and its gradient [n, V]."""
    log_probs = logits.log_softmax(-1)
    value = -log_probs.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    grad = log_probs.exp_()
    grad[torch.arange(len(labels), device=labels.device), labels] -= 1
    return value, grad


class Sft(Method):
    """-log p(response token), arXiv 2406.17328, equation 1."""

    def __init__(self, settings: SftConfig, student: Model, teacher: Model | None, memory_mb: int) -> None:
        super().__init__(settings, student, teacher, memory_mb)
        self.weights = {"ce": 1.0}

    def forward(self, student: Tokens, teacher: Tokens | None, scales: dict[str, float]) -> LossOutput:
        streamed = StreamedLogits(student.hidden, self.student.head(), grad_head=True)
        total = student.hidden.new_zeros((), dtype=torch.float32)
        correct = total.clone()
        train = torch.is_grad_enabled()
        with torch.no_grad():
            for rows in chunks(len(student.labels), self.memory_mb, [2 * self.student.vocab_size]):
                logits, labels = streamed.logits(rows), student.labels[rows]
                value, grad = cross_entropy(logits, labels)
                total += value.sum()
                correct += logits.argmax(-1).eq(labels).sum()
                if train:
                    streamed.backward(rows, grad.mul_(scales["ce"]), logits)
        parts = {"ce": total}
        loss = attach_gradients(self.scaled(parts, scales), streamed.gradients(student.hidden) if train else [])
        return LossOutput(loss, parts, {"accuracy": Sum(correct, len(student.labels))})
