"""Universal logit distillation: distance of the sorted probabilities, whatever the tokens are (arXiv 2402.12030)."""

import torch
from torch import Tensor

from dskd.config.methods import UldConfig
from dskd.losses.distances import Sorted
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

    @property
    def distance(self) -> Sorted:
        return Sorted()
