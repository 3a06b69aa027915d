"""Dual-space distillation with cross-model attention, for two vocabularies (arXiv 2406.17328, section 3.3).

The teacher's hidden states are brought into the student's space (t2s), and the student's into the teacher's (s2t), by
attention between the two token sequences; each side's own head then gives distributions to compare.
"""

import math

import torch
from torch import Tensor, nn

from dskd.config.methods import DskdCmaConfig
from dskd.losses.divergence import at_temperature, distance, forward_kl
from dskd.losses.method import Method
from dskd.losses.sft import cross_entropy
from dskd.losses.streaming import StreamedLogits, attach_gradients, chunks
from dskd.losses.tensors import LossOutput, Model, Sum, Tokens


class DskdCma(Method):
    """Projectors (d, D: hidden sizes of student and teacher): t2s D -> d, s2t d -> D, query 2d -> 2D."""

    def __init__(self, settings: DskdCmaConfig, student: Model, teacher: Model | None, memory_mb: int) -> None:
        super().__init__(settings, student, teacher, memory_mb)
        d, wide = self.student.hidden_size, self.teacher.hidden_size
        self.t2s, self.s2t, self.query = nn.Linear(wide, d), nn.Linear(d, wide), nn.Linear(2 * d, 2 * wide)
        rate = settings.kd_rate
        self.weights = {"ce": 1 - rate, "t2s_ce": rate, "t2s_kd": rate, "s2t_kd": rate}
        self.distance = distance(settings)
        self.s2t_distance = at_temperature(forward_kl, settings.temperature)

    def forward(self, student: Tokens, teacher: Tokens | None, scales: dict[str, float]) -> LossOutput:
        assert teacher is not None
        t2s_hidden, s2t_hidden = self.cross_attention(student, teacher)
        return self.loss(student, teacher, t2s_hidden, s2t_hidden, scales)

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

    def loss(
        self, student: Tokens, teacher: Tokens, t2s_hidden: Tensor, s2t_hidden: Tensor, scales: dict[str, float]
    ) -> LossOutput:
        head, teacher_head = self.student.head(), self.teacher.head()
        streamed = StreamedLogits(student.hidden, head, grad_head=True)
        t2s = StreamedLogits(t2s_hidden, head)  # the head takes no gradient from the projected states
        s2t = StreamedLogits(s2t_hidden, teacher_head)
        target = StreamedLogits(teacher.hidden, teacher_head, grad_hidden=False)
        ce, t2s_ce, t2s_kd, s2t_kd, correct, t2s_correct, s2t_correct = torch.zeros(7, device=student.hidden.device)
        with torch.no_grad():
            for rows in chunks(len(student.labels), self.memory_mb, [7 * self.student.vocab_size]):
                logits, projected, labels = streamed.logits(rows), t2s.logits(rows), student.labels[rows]
                right = projected.argmax(-1).eq(labels)
                t2s_correct += right.sum()
                correct += logits.argmax(-1).eq(labels).sum()

                value, grad = cross_entropy(projected, labels)
                t2s_ce += value.sum()
                t2s.backward(rows, grad.mul_(scales["t2s_ce"]), projected)

                # Only where the projected teacher is right is it worth learning from (equation 7).
                value, kd_grad = self.distance(logits, projected)
                t2s_kd += (value * right).sum()
                value, grad = cross_entropy(logits, labels)
                ce += value.sum()
                grad.mul_(scales["ce"]).addcmul_(kd_grad, right.unsqueeze(-1).float(), value=scales["t2s_kd"])
                streamed.backward(rows, grad, logits)
            for rows in chunks(len(teacher.labels), self.memory_mb, [5 * self.teacher.vocab_size]):
                logits, labels = s2t.logits(rows), teacher.labels[rows]
                s2t_correct += logits.argmax(-1).eq(labels).sum()
                value, grad = self.s2t_distance(logits, target.logits(rows))
                s2t_kd += value.sum()
                s2t.backward(rows, grad.mul_(scales["s2t_kd"]), logits)
        parts = {"ce": ce, "t2s_ce": t2s_ce, "t2s_kd": t2s_kd, "s2t_kd": s2t_kd}
        gradients = streamed.gradients(student.hidden) + t2s.gradients(t2s_hidden) + s2t.gradients(s2t_hidden)
        metrics = {
            "accuracy": Sum(correct, len(student.labels)),
            "t2s_accuracy": Sum(t2s_correct, len(student.labels)),
            "s2t_accuracy": Sum(s2t_correct, len(teacher.labels)),
        }
        return LossOutput(attach_gradients(self.scaled(parts, scales), gradients), parts, metrics)


def normalized(states: Tensor) -> Tensor:
    """Divided by the standard deviation over all their values."""
    return states / states.std().clamp_min(torch.finfo(states.dtype).tiny) if states.numel() > 1 else states
