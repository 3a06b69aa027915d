"""Universal logit distillation: distance of the sorted probabilities, whatever the tokens are (arXiv 2402.12030)."""

import numpy as np
import torch
from torch import Tensor

from dskd.losses.divergence import through_softmax
from dskd.losses.logit_method import LogitMethod
from dskd.losses.tensors import Tokens


class Uld(LogitMethod):
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
        ordered, order = sort_with_order(probs)
        largest, rest = largest_sorted(teacher_probs, shared)
        gap = ordered[:, width - shared :] - largest
        # Where the other side has run out of tokens, the gap is the probability itself.
        value = gap.abs().sum(-1) + rest + ordered[:, : width - shared].sum(-1)
        slope = torch.ones_like(probs)
        slope.scatter_(-1, order[:, width - shared :], gap.sign_())
        return value, through_softmax(probs, slope)


def sort_with_order(probs: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities [n, V] in increasing order, and the column of each.

    On a CPU one sort of 64-bit keys does both: positive floats are ordered like their bits, so the column fits below
    them, and numpy sorts such keys, taken for doubles, with vector instructions.
    """
    if probs.device.type != "cpu":
        return probs.sort(-1)
    keys = probs.numpy().view(np.uint32).astype(np.uint64)
    keys <<= np.uint64(32)
    keys |= np.arange(probs.shape[-1], dtype=np.uint64)
    keys.view(np.float64).sort(axis=-1)
    order = (keys & np.uint64(2**32 - 1)).view(np.int64)
    keys >>= np.uint64(32)
    return torch.from_numpy(keys.astype(np.uint32).view(np.float32)), torch.from_numpy(order)


def largest_sorted(probs: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest probabilities of each row in increasing order, and the sum of the others."""
    others = probs.shape[-1] - count
    if probs.device.type != "cpu":
        ordered = probs.sort(-1).values
        return ordered[:, others:], ordered[:, :others].sum(-1)
    values = probs.numpy()
    if others:
        values.partition(others, axis=-1)
    values[:, others:].sort(axis=-1)
    return probs[:, others:], probs[:, :others].sum(-1)
