"""Losses over a block of fp32 logits in torch, for every device; a block stays in a processor's cache."""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from dskd.losses.cross_entropy import cross_entropy, predicts
from dskd.losses.kernels import Block, Found, Scales, Terms
from dskd.losses.tensors import Head

CHUNK_TOKENS = 512  # matrix products on a CPU gain nothing from more rows
BLOCK_CELLS = {"cpu": 2**19}  # logits of a block; on a CPU 2 MiB, which beats 64 MiB four times over
OTHER_BLOCK_CELLS = 2**25


def chunk_tokens() -> int:
    return CHUNK_TOKENS


def block_tokens(device: torch.device, width: int) -> int:
    return max(1, BLOCK_CELLS.get(device.type, OTHER_BLOCK_CELLS) // width)


def buffer(tokens: int, weight: Tensor) -> Tensor:
    return torch.empty(tokens, len(weight), device=weight.device)


def shape(logits: Tensor, head: Head) -> None:
    if head.scale != 1.0:
        logits.mul_(head.scale)
    if head.softcap is not None:
        logits.div_(head.softcap).tanh_().mul_(head.softcap)


def predictions(block: Block) -> Tensor:
    return block.logits.argmax(-1)


def measure(student: Block, teacher: Block | None, terms: Terms) -> Found:
    logits, labels = student.logits, terms.labels
    nothing = logits.new_empty(0)
    ce = distance = teacher_ce = predicted = nothing
    grad = distance_grad = teacher_grad = None
    correct = predicts(logits, labels)
    if terms.distance is not None:
        distance, distance_grad = terms.distance(logits, labels if teacher is None else teacher.logits)
    if terms.cross_entropy:
        ce, grad = cross_entropy(logits, labels, terms.smoothing)
    if teacher is not None and terms.predictions:
        predicted = predictions(teacher)
    if teacher is not None and terms.teacher_labels is not None:
        teacher_ce, teacher_grad = cross_entropy(teacher.logits, terms.teacher_labels)
    gradients = Gradients(grad, distance_grad, teacher_grad)
    return Found(correct, ce, distance, predicted, teacher_ce, partial(write, student, teacher, gradients))


class Gradients(NamedTuple):
    """With respect to the logits, not scaled yet."""

    ce: Tensor | None
    distance: Tensor | None
    teacher_ce: Tensor | None


def write(student: Block, teacher: Block | None, gradients: Gradients, scales: Scales) -> None:
    grad, distance_grad = gradients.ce, gradients.distance
    if distance_grad is not None and scales.learn is not None:
        distance_grad.mul_(scales.learn.unsqueeze(-1))
    if grad is None and distance_grad is not None:
        grad = distance_grad.mul_(scales.distance)
    elif grad is not None:
        grad.mul_(scales.ce)
        if distance_grad is not None:
            grad[:, : distance_grad.shape[-1]].add_(distance_grad, alpha=scales.distance)
    if grad is not None:
        through_head(student, grad)
    if teacher is not None and gradients.teacher_ce is not None:
        through_head(teacher, gradients.teacher_ce.mul_(scales.teacher_ce))


def through_head(block: Block, grad: Tensor) -> None:
    """Overwrite logits by `grad`, their gradient, carried through soft-cap and scale; `grad` is overwritten too."""
    logits, head = block.logits, block.head
    if head.softcap is not None:
        grad.mul_(logits.div_(head.softcap).square_().neg_().add_(1))
    if head.scale != 1.0:
        grad.mul_(head.scale)
    logits.copy_(grad)
