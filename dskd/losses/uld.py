"""Universal logit distillation: distance of the sorted probabilities, whatever the tokens are (arXiv 2402.12030)."""

import torch
from torch import Tensor

from dskd.config.methods import UldConfig
from dskd.losses.divergence import through_softmax
from dskd.losses.kernels import sorting
from dskd.losses.logit_method import LogitMethod
from dskd.losses.tensors import Tokens


class Uld(LogitMethod[UldConfig]):
    """Tokens are aligned from the start of each response, as far as the shorter of both goes."""

    def aligned(self, student: Tokens, teacher: Tokens) -> Tensor:
        pairs, teacher_start, student_start = [], 0, 0
        for teacher_length, student_length in zip(teacher.lengths, student.lengths, strict=True):
            index = torch.arange(min(teacher_length, student_length), device=student.labels.device)
            pairs.append(torch.stack([index + teacher_start, index + student_start], dim=1))
            teacher_start, student_start = teacher_start + teacher_length, student_start + student_length
        return torch.cat(pairs)

    def distance(self, logits: Tensor, teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of |p - q| over both sides' probabilities in the order of their size; the shorter list ends in zeros."""
        probs, teacher_probs = logits.softmax(-1), teacher_logits.softmax(-1)
        width, teacher_width = probs.shape[-1], teacher_probs.shape[-1]
        shared = min(width, teacher_width)
        ordered, order = sorting.sort_with_order(probs)
        largest, rest = sorting.largest_sorted(teacher_probs, shared)
        gap = ordered[:, width - shared :] - largest
        # Where the other side has run out of tokens, the gap is the probability itself.
        value = gap.abs().sum(-1) + rest + ordered[:, : width - shared].sum(-1)
        slope = torch.ones_like(probs)
        slope.scatter_(-1, order[:, width - shared :], gap.sign_())
        return value, through_softmax(probs, slope)
