"""Distances between the student's and the teacher's distribution, with their gradients written out.

Each takes logits [n, V] that are divided by the temperature already and returns the distance of each token [n] and its
gradient with respect to the student's logits [n, V]. p is the student's distribution, q the teacher's. For a distance
whose derivative with respect to p_i is a_i, the gradient with respect to logit i is p_i (a_i - sum_j p_j a_j).
Definitions: arXiv 2406.17328, section 2.2 and appendix.
"""

import torch
from torch import Tensor

from dskd.losses.cross_entropy import softmax


def through_softmax(probs: Tensor, slope: Tensor) -> Tensor:
    """Gradient with respect to logits, from `slope` [n, V], that with respect to probabilities (overwritten)."""
    mean = torch.linalg.vecdot(probs, slope).unsqueeze_(-1)
    return slope.sub_(mean).mul_(probs)


def log_of_mixture(mixture: Tensor) -> Tensor:
    # Where both sides underflow to 0 the log must stay finite, or 0 x -inf makes the distance NaN.
    return mixture.clamp_min_(torch.finfo(mixture.dtype).tiny).log()


def forward_kl(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """KL(q || p)."""
    (p, log_sum_p), (q, log_sum_q) = softmax(student), softmax(teacher)
    value = torch.linalg.vecdot(q, teacher - student) + (log_sum_p - log_sum_q)
    return value, p.sub_(q)


def reverse_kl(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p || q)."""
    p, log_sum_p = softmax(student)
    ratio = (student - teacher).add_((teacher.logsumexp(-1) - log_sum_p).unsqueeze_(-1))
    value = torch.linalg.vecdot(p, ratio)
    return value, ratio.sub_(value.unsqueeze(-1)).mul_(p)


def js_divergence(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """(KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2."""
    (p, log_sum_p), (q, log_sum_q) = softmax(student), softmax(teacher)
    log_m = log_of_mixture(torch.lerp(p, q, 0.5))
    to_p = (student - log_m).sub_(log_sum_p.unsqueeze_(-1))
    to_q = log_m.neg_().add_(teacher).sub_(log_sum_q.unsqueeze_(-1))
    value = (torch.linalg.vecdot(p, to_p) + torch.linalg.vecdot(q, to_q)) / 2
    return value, through_softmax(p, to_p.div_(2))


def skewed_forward_kl(student: Tensor, teacher: Tensor, skew: float) -> tuple[Tensor, Tensor]:
    """KL(q || m) with m = skew q + (1 - skew) p."""
    p, (q, log_sum_q) = student.softmax(-1), softmax(teacher)
    mixed = torch.lerp(p, q, skew)
    ratio = log_of_mixture(mixed).neg_().add_(teacher).sub_(log_sum_q.unsqueeze_(-1))
    value = torch.linalg.vecdot(q, ratio)
    return value, through_softmax(p, q.div_(mixed).mul_(skew - 1))


def skewed_reverse_kl(student: Tensor, teacher: Tensor, skew: float) -> tuple[Tensor, Tensor]:
    """KL(p || m) with m = (1 - skew) q + skew p."""
    (p, log_sum_p), q = softmax(student), teacher.softmax(-1)
    mixed = torch.lerp(q, p, skew)
    ratio = log_of_mixture(mixed).neg_().add_(student).sub_(log_sum_p.unsqueeze_(-1))
    value = torch.linalg.vecdot(p, ratio)
    return value, through_softmax(p, ratio.sub_(mixed.reciprocal_().mul_(p).mul_(skew)))


def adaptive_kl(student: Tensor, teacher: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Forward and reverse KL, weighed by where p and q differ: the head of q (mass alpha) or its tail (AKL).

    Of equal probabilities the first ones are the tail, whatever sorts them: bf16 logits have many.
    """
    p, q = student.softmax(-1), teacher.softmax(-1)
    sorted_q, order = q.sort(dim=-1, stable=True)
    gap = (q.sub_(p)).abs_().gather(-1, order)
    tail = torch.linalg.vecdot(gap, sorted_q.cumsum_(-1).lt_(alpha))
    weight = (1 - tail / gap.sum(-1).clamp_min_(torch.finfo(gap.dtype).tiny)).unsqueeze(-1)
    del p, q, sorted_q, order, gap
    forward, forward_grad = forward_kl(student, teacher)
    reverse, reverse_grad = reverse_kl(student, teacher)
    return torch.lerp(reverse, forward, weight.squeeze(-1)), reverse_grad.lerp_(forward_grad, weight)
