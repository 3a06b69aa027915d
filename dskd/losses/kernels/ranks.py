"""Triton: the distance of sorted probabilities without sorting, for bf16 logits.

The derivative of sum_r |p_(r) - q_(r)| with respect to a probability is the sign of its gap to the other side's
probability of the same rank. Ranks follow from counts: a row's bf16 logits take few distinct values, so one pass counts
how often each occurs, in `BINS` bins, and all that follows goes over bins. Equal probabilities share their signs' mean.

Bins keep all of bf16 between 2**-15 and 2**17 in size; smaller logits count as 0 and larger ones as 2**17. That moves a
probability by 2**-15 of itself, far less than the rounding of a logit to bf16 does.
"""

import triton
import triton.language as tl

from dskd.losses.kernels.rows import LOWEST, through_head

BINS = 2**13
ZERO = tl.constexpr(2**12)  # the bin of 0; above it the positive, below it the negative
SMALLEST = tl.constexpr((127 - 15) * 2**7)  # 2**-15 as bf16, its bits taken for an integer


@triton.jit
def bin_of(product):
    """Bins of bf16 numbers, in their order: 1 to BINS - 1."""
    bits = product.to(tl.float32).to(tl.int32, bitcast=True)
    size = ((bits & 0x7FFFFFFF) >> 16) - (SMALLEST - 1)
    size = tl.minimum(tl.maximum(size, 0), ZERO - 1)
    return tl.where(bits < 0, ZERO - size, ZERO + size)


@triton.jit
def logits_of(bins, scale, cap, CAPPED: tl.constexpr):
    """Logits of the numbers in these bins."""
    size = tl.abs(bins - ZERO)
    number = ((size + (SMALLEST - 1)) << 16).to(tl.float32, bitcast=True)
    number = tl.where(size == 0, 0.0, tl.where(bins < ZERO, -number, number))
    return through_head(number, scale, cap, CAPPED)


@triton.jit
def count(product, counts, width, stride, BINS: tl.constexpr, BLOCK: tl.constexpr):
    """How many of a row's numbers are in each bin, added to counts [n, BINS]."""
    row = tl.program_id(0).to(tl.int64)
    product += row * stride
    for first in range(0, width, BLOCK):
        at = first + tl.arange(0, BLOCK)
        inside = at < width
        bins = bin_of(tl.load(product + at, mask=inside, other=0.0))
        tl.atomic_add(counts + row * BINS + bins, 1, mask=inside, sem="relaxed")


@triton.jit
def sum_up(counts, lse, scale, cap, CAPPED: tl.constexpr, BINS: tl.constexpr):
    """Counts of each bin become counts up to it, and give the logsumexp [n] of the row."""
    row = tl.program_id(0).to(tl.int64)
    bins = tl.arange(0, BINS)
    counts += row * BINS + bins
    found = tl.load(counts)
    logits = logits_of(bins, scale, cap, CAPPED)
    top = tl.max(tl.where(found > 0, logits, LOWEST), 0)
    mass = tl.sum(tl.where(found > 0, found * tl.exp(logits - top), 0.0), 0)
    tl.store(lse + row, top + tl.log(mass))
    tl.store(counts, tl.cumsum(found, 0))


@triton.jit
def signs(
    counts,
    other_counts,
    lse,
    other_lse,
    slopes,
    value,
    slope_mean,
    scale,
    cap,
    other_scale,
    other_cap,
    KEEP: tl.constexpr,
    CAPPED: tl.constexpr,
    OTHER_CAPPED: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One side's part of the distance, added to `value`; with KEEP, the mean sign in each bin, and p's mean of it."""
    row = tl.program_id(0).to(tl.int64)
    counts += row * BINS
    other_counts += row * BINS
    own_lse = tl.load(lse + row)
    shift = tl.load(other_lse + row)
    every = tl.load(counts + BINS - 1)
    other_every = tl.load(other_counts + BINS - 1)
    summed = tl.zeros([BLOCK], tl.float32)
    for first in range(0, BINS, BLOCK):
        bins = first + tl.arange(0, BLOCK)
        up_to = tl.load(counts + bins)
        here = up_to - tl.load(counts + bins - 1, mask=bins > 0, other=0)
        log_p = logits_of(bins, scale, cap, CAPPED) - own_lse

        # The last of the other side's bins whose probability is smaller; bin 0 is empty.
        smaller = tl.zeros([BLOCK], tl.int32)
        step = BINS // 2
        while step > 0:
            log_q = logits_of(smaller + step, other_scale, other_cap, OTHER_CAPPED) - shift
            smaller = tl.where(log_q < log_p, smaller + step, smaller)
            step = step // 2
        following = tl.minimum(smaller + 1, BINS - 1)
        same = logits_of(following, other_scale, other_cap, OTHER_CAPPED) - shift == log_p
        larger = other_every - tl.load(other_counts + tl.where(same, following, smaller))
        not_smaller = other_every - tl.load(other_counts + smaller)

        # Ranks of this bin, from the largest on: `rank` to rank + here.
        rank = every - up_to
        minus = tl.minimum(tl.maximum(larger - rank, 0), here)
        plus = tl.minimum(tl.maximum(rank + here - not_smaller, 0), here)
        sign = (plus - minus).to(tl.float32)
        summed += tl.where(here > 0, sign * tl.exp(log_p), 0.0)
        if KEEP:
            tl.store(slopes + row * BINS + bins, sign / tl.maximum(here, 1))
    total = tl.sum(summed, 0)
    tl.store(value + row, tl.load(value + row) + total)
    if KEEP:
        tl.store(slope_mean + row, total)
