"""The successor of dual-space distillation, for one vocabulary and for two (arXiv 2504.11426).

Projectors begin as what the two heads imply: W_s t2s(h) is closest to W_t h, and W_t s2t(h) to W_s h, over the tokens
that both vocabularies hold. The projected teacher should predict what the teacher itself predicts, and the student
learns in its own space where it does. Across vocabularies this happens at exactly aligned tokens (ETA).
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from dskd.config.methods import DskdV2Config
from dskd.losses.dual_space import DualSpace, Projected
from dskd.losses.kernels import kernels_for
from dskd.losses.response import alignment_metrics
from dskd.losses.streaming import StreamedLogits, add_product, stream
from dskd.losses.tensors import LossOutput, MethodContext, ScaleParts, Tokens

ROWS = 2**14  # rows of a head that are copied to a wider type at a time


class Aligned(NamedTuple):
    """K aligned tokens."""

    teacher: Tensor  # [K, D] hidden states
    labels: Tensor  # [K] the teacher's next tokens
    tokens: Tensor | None  # [K] which tokens of the student; None: all, in their order


class DskdV2(DualSpace[DskdV2Config]):
    """Projectors without bias (d, D: hidden sizes of student and teacher): t2s D -> d, s2t d -> D.

    With projector_init pseudo_inverse only t2s is trained; s2t follows from both heads, once a step.
    """

    counts_itself = True
    student_ids: Tensor  # [V], the student's token of each of the teacher's, or -1
    held: Tensor  # [H], the teacher's tokens that the student has

    def __init__(self, settings: DskdV2Config, context: MethodContext) -> None:
        super().__init__(settings, context)
        held = context.student_ids
        if held is None:  # one vocabulary
            held = torch.arange(min(self.student.vocab_size, self.teacher.vocab_size))
        padding = (0, self.teacher.vocab_size - len(held))  # a head may be wider than its tokenizer
        self.register_buffer("student_ids", torch.nn.functional.pad(held, padding, value=-1), persistent=False)
        self.register_buffer("held", self.student_ids.ge(0).nonzero().squeeze(-1), persistent=False)
        self.masked = settings.agreement_mask
        self.s2t_distance = self.distance  # the first paper's is always forward KL
        d, wide = self.student.hidden_size, self.teacher.hidden_size
        self.t2s = nn.Linear(wide, d, bias=False)
        self.s2t = None if settings.projector_init == "pseudo_inverse" else nn.Linear(d, wide, bias=False)
        self.s2t_weight: Tensor | None = None
        if self.s2t is None:
            (student_weight, student_rows), (teacher_weight, teacher_rows) = self.shared()
            # No buffer: DeepSpeed would cast it.
            self.teacher_inverse = inverse_of_gram(teacher_weight, teacher_rows)
            student_inverse = inverse_of_gram(student_weight, student_rows)
            product = cross_product(student_weight, student_rows, teacher_weight, teacher_rows, torch.float64)
            with torch.no_grad():
                self.t2s.weight.copy_(student_inverse.to(product.device) @ product)

    def shared(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Both heads' weights, and their rows for the tokens that both vocabularies hold."""
        student, teacher = self.student.head().weight.detach(), self.teacher.head().weight.detach()
        return (student, self.student_ids[self.held]), (teacher, self.held)

    def start_step(self) -> None:
        self.s2t_weight = None

    def to_student(self, hidden: Tensor) -> Tensor:
        """Teacher's hidden states [K, D] in the student's space [K, d]."""
        # Not through the module: DeepSpeed's hooks on it would shard the weight again while `count_ahead` needs it.
        return torch.nn.functional.linear(hidden, self.t2s.weight)

    def to_teacher(self, hidden: Tensor) -> Tensor:
        """Student's hidden states [K, d] in the teacher's space [K, D]."""
        if self.s2t is not None:
            projected: Tensor = self.s2t(hidden)
            return projected
        if self.s2t_weight is None:
            (student, student_rows), (teacher, teacher_rows) = self.shared()
            product = cross_product(student, student_rows, teacher, teacher_rows, torch.float32)
            self.s2t_weight = (product.to(self.teacher_inverse.dtype) @ self.teacher_inverse).T.to(hidden.dtype)
        return torch.nn.functional.linear(hidden, self.s2t_weight)

    def forward(self, student: Tokens, teacher: Tokens | None, scale_parts: ScaleParts) -> LossOutput:
        assert teacher is not None
        at = self.aligned(teacher)
        own = student.hidden if at.tokens is None else student.hidden[at.tokens]
        s2t = self.teacher_space(self.to_teacher(own), at.teacher, at.labels, self.student_ids >= 0)
        assert s2t.predictions is not None
        t2s, own_counts = self.projected(at, s2t.predictions)
        counts = {"ce": len(student.labels)} | own_counts
        output = self.student_space(student, t2s, counts, scale_parts(counts), s2t)
        if teacher.pairs is not None:
            output.metrics.update(alignment_metrics(teacher.pairs, student))
        return output

    def aligned(self, teacher: Tokens) -> Aligned:
        if teacher.pairs is None:
            return Aligned(teacher.hidden, teacher.labels, None)
        from_teacher, tokens = teacher.pairs.unbind(-1)
        return Aligned(teacher.hidden[from_teacher], teacher.labels[from_teacher], tokens)

    def projected(self, at: Aligned, predictions: Tensor) -> tuple[Projected, dict[str, int]]:
        """The teacher in the student's space, where the student has the token that the teacher predicts.

        Beside it the tokens of each part but ce: all of these, or those where the projected teacher agrees.
        """
        labels, hidden = self.student_ids[predictions], self.to_student(at.teacher)
        lacking = labels < 0
        agreeing = self.agreeing(hidden, labels) if self.masked else labels.new_zeros(())
        # What a GPU's host waits for, at once: sizes of tensors follow from it.
        lacked, agreed = torch.stack([lacking.sum(), agreeing]).tolist()
        count = len(labels) - lacked
        counts = {"t2s_ce": count, "t2s_kd": agreed if self.masked else count, "s2t_kd": count}
        if at.tokens is None and not lacked:
            return Projected(hidden, labels), counts
        kept = lacking.to(torch.int8).argsort(stable=True)[:count]  # in their order, without a search for them
        tokens = kept if at.tokens is None else at.tokens[kept]
        return Projected(hidden.index_select(0, kept), labels[kept], tokens), counts

    def agreeing(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """How many of `labels` [K] the projected teacher [K, d] predicts as the teacher does; no one predicts -1."""
        streamed = StreamedLogits(hidden.detach(), self.student.head())
        found = torch.zeros((), dtype=torch.int64, device=labels.device)
        kernels = kernels_for(streamed.weight)
        for rows, (projected,) in stream(range(len(labels)), self.memory_mb, kernels, streamed):
            found += kernels.predictions(projected).eq(labels[rows]).sum()
        return found

    @torch.no_grad()
    def count_ahead(self, teacher: Tokens) -> dict[str, int]:
        at = self.aligned(teacher)
        predictions = torch.empty_like(at.labels)
        streamed = StreamedLogits(at.teacher, self.teacher.head())
        kernels = kernels_for(streamed.weight)
        for rows, (own,) in stream(range(len(at.labels)), self.memory_mb, kernels, streamed):
            predictions[rows] = kernels.predictions(own)
        return self.projected(at, predictions)[1]


def cross_product(left: Tensor, left_rows: Tensor, right: Tensor, right_rows: Tensor, dtype: torch.dtype) -> Tensor:
    """left[left_rows].T @ right[right_rows], [d, D], in `dtype`."""
    total = torch.zeros(left.shape[1], right.shape[1], dtype=dtype, device=right.device)
    for a, b in zip(torch.split(left_rows, ROWS), torch.split(right_rows, ROWS), strict=True):
        one, other = left[a.to(left.device)].to(right.device), right[b.to(right.device)]
        if not (total.device.type != "cpu" and dtype == torch.float32 and one.dtype == other.dtype):
            one, other = one.to(dtype), other.to(dtype)
        add_product(total, one.T, other)  # bf16 as it is where the sum is in fp32 all the same
    return total


def inverse_of_gram(weight: Tensor, rows: Tensor) -> Tensor:
    """(W^T W)^-1 [D, D] in fp64, or its pseudo-inverse: W times it is the transposed pseudo-inverse of W^T.

    It is always used with W beside it, so that an error grows with the condition of W and not with its square.
    """
    inverse: Tensor = torch.linalg.pinv(cross_product(weight, rows, weight, rows, torch.float64), hermitian=True)
    return inverse
