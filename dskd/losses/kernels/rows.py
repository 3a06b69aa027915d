"""Triton: statistics of a row of logits of both sides. One program goes along the logits of one token.

Sums are in fp32, whatever the logits are in. Columns without a part in the distance (beyond the narrower head, or
without a source in the teacher's vocabulary) count as -inf in the teacher's row.

What is known of each token stands in `table` [ENTRIES, n], fp32.
"""

import triton
import triton.language as tl

ENTRIES = 10
LSE = tl.constexpr(0)  # log of the sum of exponentials of the student's logits
LSE_TEMPERED = tl.constexpr(1)  # the same of those divided by the temperature, over the columns of the distance
TEACHER_LSE = tl.constexpr(2)
TEACHER_LSE_TEMPERED = tl.constexpr(3)
CORRECT = tl.constexpr(4)  # whether no logit is larger than the label's
CE = tl.constexpr(5)
TEACHER_CE = tl.constexpr(6)
VALUE = tl.constexpr(7)  # the distance
SLOPE = tl.constexpr(8)  # mean of the distance's derivative with respect to p, weighed by p; of adaptive_kl, KL(p || q)
FORWARD_SHARE = tl.constexpr(9)  # of adaptive_kl

LOWEST = tl.constexpr(-1e38)  # below all logits; unlike -inf it can be subtracted from itself
TINY = tl.constexpr(2.0**-126)  # the smallest normal number


@triton.jit
def through_head(product, scale, cap, CAPPED: tl.constexpr):
    """Logits in fp32 of what the matrix product gave."""
    logits = product.to(tl.float32) * scale
    if CAPPED:
        logits = cap * (2 * tl.sigmoid(2 * logits / cap) - 1)  # tanh
    return logits


@triton.jit
def load_teacher(teacher, at, shared, scale, cap, CAPPED: tl.constexpr):
    """Products of the teacher's side, and its logits in fp32; -inf without a part in the distance."""
    product = tl.load(teacher + at, mask=at < shared, other=float("-inf"))
    return product, tl.where(product > float("-inf"), through_head(product, scale, cap, CAPPED), float("-inf"))


@triton.jit
def statistics(
    student,
    teacher,
    labels,
    teacher_labels,
    predictions,
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
    smoothing,
    KIND: tl.constexpr,
    WANT_CE: tl.constexpr,
    WANT_PREDICTIONS: tl.constexpr,
    WANT_TEACHER_CE: tl.constexpr,
    PARTIAL: tl.constexpr,
    CAPPED: tl.constexpr,
    TEACHER_CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The first pass: all of `table` but what `mixtures`, `tails` and `ranks` add."""
    # `inverse`, `teacher_inverse`: what the logits are multiplied with for the distance.
    BETWEEN: tl.constexpr = KIND != "none" and KIND != "label" and KIND != "sorted"
    FORWARD: tl.constexpr = KIND == "forward_kl" or KIND == "adaptive_kl"
    REVERSE: tl.constexpr = KIND == "reverse_kl" or KIND == "adaptive_kl"
    TEACHER: tl.constexpr = BETWEEN or WANT_PREDICTIONS or WANT_TEACHER_CE
    row = tl.program_id(0).to(tl.int64)
    student += row * stride
    lanes = tl.arange(0, BLOCK)
    top = LOWEST
    part_top = LOWEST
    teacher_top = LOWEST
    total = 0.0
    mass = tl.zeros([BLOCK], tl.float32)
    tempered = tl.zeros([BLOCK], tl.float32)
    teacher_mass = tl.zeros([BLOCK], tl.float32)
    teacher_tempered = tl.zeros([BLOCK], tl.float32)
    forward = tl.zeros([BLOCK], tl.float32)
    reverse = tl.zeros([BLOCK], tl.float32)
    best_at = 0
    if TEACHER:
        teacher += row * teacher_stride
    for first in range(0, width, BLOCK):
        at = first + lanes
        inside = at < width
        x = through_head(tl.load(student + at, mask=inside, other=0.0), scale, cap, CAPPED)
        if WANT_CE:
            if smoothing > 0:
                total += tl.sum(tl.where(inside, x, 0.0), 0)
        x = tl.where(inside, x, float("-inf"))
        higher = tl.maximum(top, tl.max(x, 0))
        if WANT_CE:
            mass = mass * tl.exp(top - higher) + tl.exp(x - higher)
        top = higher
        if KIND == "label":
            tempered = tempered * tl.exp((part_top - higher) * inverse) + tl.exp((x - higher) * inverse)
            part_top = higher
        if TEACHER:
            _, y = load_teacher(teacher, at, shared, teacher_scale, teacher_cap, TEACHER_CAPPED)
            teacher_higher = tl.maximum(teacher_top, tl.max(y, 0))
            if WANT_PREDICTIONS:
                if teacher_higher > teacher_top:  # the first of equals stays
                    best_at = tl.min(tl.where(y == teacher_higher, at, width), 0)
            if WANT_TEACHER_CE:
                teacher_mass = teacher_mass * tl.exp(teacher_top - teacher_higher) + tl.exp(y - teacher_higher)
            if BETWEEN:
                part = y > float("-inf")
                part_higher = higher
                if PARTIAL:
                    part_higher = tl.maximum(part_top, tl.max(tl.where(part, x, float("-inf")), 0))
                less = tl.exp((part_top - part_higher) * inverse)
                p = tl.where(part, tl.exp((x - part_higher) * inverse), 0.0)
                tempered = tempered * less + p
                teacher_less = tl.exp((teacher_top - teacher_higher) * teacher_inverse)
                q = tl.exp((y - teacher_higher) * teacher_inverse)
                teacher_tempered = teacher_tempered * teacher_less + q
                gap = tl.where(part, y * teacher_inverse - x * inverse, 0.0)
                if FORWARD:
                    forward = forward * teacher_less + q * gap
                if REVERSE:
                    reverse = reverse * less - p * gap
                part_top = part_higher
            teacher_top = teacher_higher

    here = table + row
    label = tl.load(labels + row)
    at_label = through_head(tl.load(student + label), scale, cap, CAPPED)
    tl.store(here + CORRECT * n, (at_label >= top).to(tl.float32))
    if WANT_CE:
        lse = top + tl.log(tl.sum(mass, 0))
        tl.store(here + LSE * n, lse)
        tl.store(here + CE * n, lse - at_label * (1 - smoothing) - smoothing * total / width)
    if KIND == "label":
        lse_tempered = part_top * inverse + tl.log(tl.sum(tempered, 0))
        tl.store(here + LSE_TEMPERED * n, lse_tempered)
        tl.store(here + VALUE * n, lse_tempered - at_label * inverse)
    if WANT_PREDICTIONS:
        tl.store(predictions + row, best_at)
    if WANT_TEACHER_CE:
        teacher_label = tl.load(teacher_labels + row)
        at_teacher_label = through_head(tl.load(teacher + teacher_label), teacher_scale, teacher_cap, TEACHER_CAPPED)
        teacher_lse = teacher_top + tl.log(tl.sum(teacher_mass, 0))
        tl.store(here + TEACHER_LSE * n, teacher_lse)
        tl.store(here + TEACHER_CE * n, teacher_lse - at_teacher_label)
    if BETWEEN:
        z = tl.sum(tempered, 0)
        teacher_z = tl.sum(teacher_tempered, 0)
        lse_tempered = part_top * inverse + tl.log(z)
        teacher_lse_tempered = teacher_top * teacher_inverse + tl.log(teacher_z)
        tl.store(here + LSE_TEMPERED * n, lse_tempered)
        tl.store(here + TEACHER_LSE_TEMPERED * n, teacher_lse_tempered)
        difference = lse_tempered - teacher_lse_tempered
        if FORWARD:
            tl.store(here + VALUE * n, tl.sum(forward, 0) / teacher_z + difference)
        if REVERSE:  # of adaptive_kl this is kept beside
            at_reverse = SLOPE if KIND == "adaptive_kl" else VALUE
            tl.store(here + at_reverse * n, tl.sum(reverse, 0) / z - difference)


@triton.jit
def logarithms(x, y, inverse, teacher_inverse, lse, teacher_lse):
    """log p and log q, and p and q, 0 where the distance has no part; log q is -inf there."""
    log_p = x * inverse - lse
    log_q = y * teacher_inverse - teacher_lse
    return log_p, log_q, tl.where(log_q > float("-inf"), tl.exp(log_p), 0.0), tl.exp(log_q)


@triton.jit
def slope_of(log_p, log_q, p, q, skew, KIND: tl.constexpr):
    """Of the distances from a mixture of p and q: the derivative with respect to p, and the value's summand."""
    tl.static_assert(KIND == "js_divergence" or KIND == "skewed_forward_kl" or KIND == "skewed_reverse_kl")
    share = 0.5 if KIND == "js_divergence" else skew
    mixed = (1 - share) * q + share * p if KIND == "skewed_reverse_kl" else share * q + (1 - share) * p
    mixed = tl.maximum(mixed, TINY)  # where both underflow the logarithm must stay finite
    log_m = tl.log(mixed)
    to_p = tl.where(p > 0, log_p - log_m, 0.0)
    to_q = tl.where(q > 0, log_q - log_m, 0.0)
    if KIND == "js_divergence":
        slope = to_p / 2
        value = (p * to_p + q * to_q) / 2
    elif KIND == "skewed_forward_kl":
        slope = (share - 1) * q / mixed
        value = q * to_q
    else:
        slope = to_p - share * p / mixed
        value = p * to_p
    return slope, value


@triton.jit
def mixtures(
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
    skew,
    KIND: tl.constexpr,
    CAPPED: tl.constexpr,
    TEACHER_CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Value and mean slope of the distances from a mixture of p and q, which need both sums of exponentials first."""
    row = tl.program_id(0).to(tl.int64)
    student += row * stride
    teacher += row * teacher_stride
    here = table + row
    lse = tl.load(here + LSE_TEMPERED * n)
    teacher_lse = tl.load(here + TEACHER_LSE_TEMPERED * n)
    values = tl.zeros([BLOCK], tl.float32)
    slopes = tl.zeros([BLOCK], tl.float32)
    for first in range(0, shared, BLOCK):
        at = first + tl.arange(0, BLOCK)
        x = through_head(tl.load(student + at, mask=at < shared, other=0.0), scale, cap, CAPPED)
        _, y = load_teacher(teacher, at, shared, teacher_scale, teacher_cap, TEACHER_CAPPED)
        log_p, log_q, p, q = logarithms(x, y, inverse, teacher_inverse, lse, teacher_lse)
        slope, value = slope_of(log_p, log_q, p, q, skew, KIND)
        values += value
        slopes += p * slope
    tl.store(here + VALUE * n, tl.sum(values, 0))
    tl.store(here + SLOPE * n, tl.sum(slopes, 0))
