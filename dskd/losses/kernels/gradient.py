"""Triton: the gradient of all terms, written over the logits that it is with respect to."""

import triton
import triton.language as tl

from dskd.losses.kernels.ranks import bin_of
from dskd.losses.kernels.rows import (
    FORWARD_SHARE,
    LSE,
    LSE_TEMPERED,
    SLOPE,
    TEACHER_LSE,
    TEACHER_LSE_TEMPERED,
    VALUE,
    load_teacher,
    logarithms,
    slope_of,
    through_head,
)


@triton.jit
def back_through_head(grad, logits, scale, cap, CAPPED: tl.constexpr):
    """Gradient with respect to the matrix product, of that with respect to logits."""
    if CAPPED:
        bent = logits / cap
        grad = grad * (1 - bent * bent)
    return grad * scale


@triton.jit
def gradient(
    student,
    teacher,
    labels,
    teacher_labels,
    learn,
    slopes,
    table,
    n,
    width,
    stride,
    shared,
    teacher_stride,
    scale,
    cap,
    teacher_scale,
    teacher_cap,
    inverse,
    teacher_inverse,
    skew,
    smoothing,
    ce_scale,
    distance_scale,
    teacher_ce_scale,
    KIND: tl.constexpr,
    WANT_CE: tl.constexpr,
    WANT_TEACHER_CE: tl.constexpr,
    LEARN: tl.constexpr,
    CAPPED: tl.constexpr,
    TEACHER_CAPPED: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    BETWEEN: tl.constexpr = KIND != "none" and KIND != "label" and KIND != "sorted"
    row = tl.program_id(0).to(tl.int64)
    student += row * stride
    here = table + row
    label = tl.load(labels + row)
    if WANT_CE or KIND == "sorted":
        lse = tl.load(here + LSE * n)
    if KIND != "none":
        weight = distance_scale
        if LEARN:
            weight *= tl.load(learn + row)
        slope_mean = tl.load(here + SLOPE * n)
    if BETWEEN or KIND == "label":
        lse_tempered = tl.load(here + LSE_TEMPERED * n)
        weight *= inverse  # the logits were divided
    if BETWEEN:
        teacher_lse_tempered = tl.load(here + TEACHER_LSE_TEMPERED * n)
        forward_share = tl.load(here + FORWARD_SHARE * n)
        value = tl.load(here + VALUE * n)
    if BETWEEN or WANT_TEACHER_CE:
        teacher += row * teacher_stride
    if WANT_TEACHER_CE:
        teacher_lse = tl.load(here + TEACHER_LSE * n)
        teacher_label = tl.load(teacher_labels + row)
    for first in range(0, width, BLOCK):
        at = first + tl.arange(0, BLOCK)
        inside = at < width
        product = tl.load(student + at, mask=inside, other=0.0)
        x = through_head(product, scale, cap, CAPPED)
        grad = tl.zeros([BLOCK], tl.float32)
        if WANT_CE:
            target = smoothing / width + tl.where(at == label, 1 - smoothing, 0.0)
            grad += ce_scale * (tl.exp(x - lse) - target)
        if KIND == "label":
            grad += weight * (tl.exp(x * inverse - lse_tempered) - tl.where(at == label, 1.0, 0.0))
        if KIND == "sorted":
            slope = tl.load(slopes + row * BINS + bin_of(product), mask=inside, other=0.0)
            grad += weight * tl.exp(x - lse) * (slope - slope_mean)
        if BETWEEN or WANT_TEACHER_CE:
            _, y = load_teacher(teacher, at, shared, teacher_scale, teacher_cap, TEACHER_CAPPED)
        if BETWEEN:
            log_p, log_q, p, q = logarithms(x, y, inverse, teacher_inverse, lse_tempered, teacher_lse_tempered)
            if KIND == "forward_kl":
                slope = p - q
            elif KIND == "reverse_kl":
                slope = p * (log_p - log_q - value)
            elif KIND == "adaptive_kl":
                slope = forward_share * (p - q) + (1 - forward_share) * p * (log_p - log_q - slope_mean)
            else:
                of_p, _ = slope_of(log_p, log_q, p, q, skew, KIND)
                slope = p * (of_p - slope_mean)
            grad += tl.where(log_q > float("-inf"), weight * slope, 0.0)
        grad = back_through_head(grad, x, scale, cap, CAPPED)
        tl.store(student + at, grad.to(product.dtype), mask=inside)
        if WANT_TEACHER_CE:
            teacher_grad = teacher_ce_scale * (tl.exp(y - teacher_lse) - tl.where(at == teacher_label, 1.0, 0.0))
            teacher_grad = back_through_head(teacher_grad, y, teacher_scale, teacher_cap, TEACHER_CAPPED)
            tl.store(teacher + at, teacher_grad.to(teacher.dtype.element_ty), mask=inside)
