"""Triton: the teacher's logits carried into the student's vocabulary."""

import triton
import triton.language as tl

from dskd.losses.kernels.rows import LOWEST, through_head


@triton.jit
def carry(
    teacher,
    carried,
    targets,
    starts,
    runs,
    sources,
    count,
    longest,
    stride,
    carried_stride,
    scale,
    cap,
    inverse,
    CAPPED: tl.constexpr,
    COLUMNS: tl.constexpr,
    RUN: tl.constexpr,
):
    """Logits of targets such that each has the probability of all its sources.

    A program carries COLUMNS targets, whose runs of sources it goes along RUN at a time.
    """
    row = tl.program_id(1).to(tl.int64)
    teacher += row * stride
    at = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = at < count
    start = tl.load(starts + at, mask=inside, other=0)
    run = tl.load(runs + at, mask=inside, other=0)
    top = tl.full([COLUMNS], LOWEST, tl.float32)
    mass = tl.zeros([COLUMNS], tl.float32)
    for first in range(0, longest, RUN):
        step = first + tl.arange(0, RUN)
        there = step[None, :] < run[:, None]
        source = tl.load(sources + start[:, None] + step[None, :], mask=there, other=0)
        y = through_head(tl.load(teacher + source, mask=there, other=0.0), scale, cap, CAPPED)
        y = tl.where(there, y, float("-inf"))
        higher = tl.maximum(top, tl.max(y, 1))
        mass = mass * tl.exp((top - higher) * inverse) + tl.sum(tl.exp((y - higher[:, None]) * inverse), 1)
        top = higher
    logits = top + tl.log(tl.maximum(mass, 1.0)) / inverse  # the largest alone has a mass of 1
    target = tl.load(targets + at, mask=inside, other=0)
    tl.store(carried + row * carried_stride + target, logits.to(carried.dtype.element_ty), mask=inside)
