"""Triton: how adaptive_kl weighs its two halves, without sorting.

The tail of q are its smallest probabilities, as far as their sum stays below alpha; of equal ones the first. Which that
are says one threshold: a search over the bits of the teacher's logits finds it, four bits at a pass over the teacher's
row. Sixteen-bit logits take four passes, fp32 eight; one more over both sides sums up |p - q|.
"""

import triton
import triton.language as tl

from dskd.losses.kernels.rows import (
    FORWARD_SHARE,
    LSE_TEMPERED,
    SLOPE,
    TEACHER_LSE_TEMPERED,
    TINY,
    VALUE,
    load_teacher,
    logarithms,
    through_head,
)


@triton.jit
def key_of(product, BITS: tl.constexpr):
    """Integers in the order of the numbers; BITS = 16 keeps what bf16 has."""
    bits = product.to(tl.float32).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> (32 - BITS)


@triton.jit
def tails(
    student,
    teacher,
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
    alpha,
    BITS: tl.constexpr,
    CAPPED: tl.constexpr,
    TEACHER_CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    student += row * stride
    teacher += row * teacher_stride
    here = table + row
    lse = tl.load(here + LSE_TEMPERED * n)
    teacher_lse = tl.load(here + TEACHER_LSE_TEMPERED * n)
    lanes = tl.arange(0, BLOCK)
    steps = tl.arange(0, 16)

    # The largest key below which the mass of q is less than alpha, and that mass.
    key = -(1 << (BITS - 2)) * 2
    below = 0.0
    for digit in range(1, BITS // 4 + 1):
        unit = 1 << (BITS - 4 * digit)
        candidates = key + steps * unit
        masses = tl.zeros([BLOCK, 16], tl.float32)
        for first in range(0, shared, BLOCK):
            at = first + lanes
            product, y = load_teacher(teacher, at, shared, teacher_scale, teacher_cap, TEACHER_CAPPED)
            q = tl.exp(y * teacher_inverse - teacher_lse)
            keys = key_of(product, BITS)
            masses += tl.where(keys[:, None] < candidates[None, :], q[:, None], 0.0)  # -inf has no mass
        mass = tl.sum(masses, 0)
        lower = mass < alpha  # true of the first ones, and of the very first in any case
        chosen = tl.max(tl.where(lower, steps, 0), 0)
        below = tl.sum(tl.where(steps == chosen, mass, 0.0), 0)
        key += chosen * unit

    gaps = tl.zeros([BLOCK], tl.float32)
    tail_gaps = tl.zeros([BLOCK], tl.float32)
    equals = 0
    for first in range(0, shared, BLOCK):
        at = first + lanes
        x = through_head(tl.load(student + at, mask=at < shared, other=0.0), scale, cap, CAPPED)
        product, y = load_teacher(teacher, at, shared, teacher_scale, teacher_cap, TEACHER_CAPPED)
        _, log_q, p, q = logarithms(x, y, inverse, teacher_inverse, lse, teacher_lse)
        gap = tl.abs(p - q)
        keys = key_of(product, BITS)
        equal = (keys == key) & (log_q > float("-inf"))
        rank = equals + tl.cumsum(equal.to(tl.int32), 0)
        tail = (keys < key) | (equal & (below + rank * q < alpha))
        gaps += gap
        tail_gaps += tl.where(tail, gap, 0.0)
        equals += tl.sum(equal.to(tl.int32), 0)
    share = 1 - tl.sum(tail_gaps, 0) / tl.maximum(tl.sum(gaps, 0), TINY)
    forward = tl.load(here + VALUE * n)
    reverse = tl.load(here + SLOPE * n)
    tl.store(here + FORWARD_SHARE * n, share)
    tl.store(here + VALUE * n, reverse + share * (forward - reverse))
