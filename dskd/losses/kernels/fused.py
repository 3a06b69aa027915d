"""Losses over a chunk of logits by Triton kernels, for GPUs: logits stay in the type of the product.

Passes over the logits, student's/teacher's, a read unless it says otherwise:

    cross-entropy alone                    2/-      and one write of the gradient over the student's logits
    forward_kl, reverse_kl                 2/2      the same; a teacher's cross-entropy is written over its logits
    js_divergence, skewed_*                3/3      their value needs both sums of exponentials first
    adaptive_kl                            3/7      four for the head of q; fp32 logits: 3/11
    Sorted                                 3/1      and tables of some 100 KB a token
    Carried                                as above, over the student's columns, after 1 of the teacher's logits
"""

from typing import Any

import torch
from torch import Tensor

from dskd.losses.distances import Carried, Distance, Sorted, Tempered, ToLabel
from dskd.losses.kernels import Block, Found, Scales, Terms, carried, ranks, rows, tails
from dskd.losses.kernels import gradient as gradients
from dskd.losses.tensors import Head

CHUNK_TOKENS = 4096  # from 2,048 on, an H100's matrix products gain nothing
BLOCK = 1024  # columns at a time: eight of each thread
SEARCH_BLOCK = 128  # of these there are sixteen sums each
RANK_BLOCK = 1024  # bins at a time
CARRY_CELLS = 1024  # sources of some targets at a time
WARPS = 4
STRIDE = 16  # rows begin at whole multiples of so many logits: then they are read 16 bytes at a time


def launch(kernel: Any, grid: tuple[int, ...], **arguments: object) -> None:
    """The one place where kernels are started."""
    kernel[grid](**arguments, num_warps=WARPS)


def computes(distance: Distance | None, dtype: torch.dtype) -> bool:
    """Whether there are kernels for this distance of logits of this type; a method from outside may have its own."""
    if isinstance(distance, Sorted):
        return dtype == torch.bfloat16
    return distance is None or isinstance(distance, Tempered | Carried | ToLabel)


def check(device: torch.device) -> None:
    """Run a kernel; raises whatever Triton does where it cannot build one for this device."""
    weight = torch.zeros(STRIDE, 1, device=device)
    block = Block(buffer(1, weight).zero_(), Head(weight), trained=False)
    measure(block, None, Terms(torch.zeros(1, dtype=torch.int64, device=device)))


def chunk_tokens() -> int:
    return CHUNK_TOKENS


def block_tokens(device: torch.device, width: int) -> int:
    return CHUNK_TOKENS


def buffer(tokens: int, weight: Tensor) -> Tensor:
    width = len(weight)
    padded = -(-width // STRIDE) * STRIDE
    return torch.empty(tokens, padded, device=weight.device, dtype=weight.dtype)[:, :width]


def shape(logits: Tensor, head: Head) -> None:
    """The kernels do it whenever they read."""


def predictions(block: Block) -> Tensor:
    # By the same kernel as beside a distance: a count must not depend on how a soft-cap is rounded.
    labels = torch.zeros(len(block.logits), dtype=torch.int64, device=block.logits.device)
    return measure(block, block, Terms(labels, cross_entropy=False, predictions=True)).predictions


def measure(student: Block, teacher: Block | None, terms: Terms) -> Found:
    n, distance, device = len(terms.labels), terms.distance, student.logits.device
    divergence = distance.divergence if isinstance(distance, Carried) else distance
    if isinstance(distance, Carried) and teacher is not None:
        teacher = carry(distance, teacher, student)
    table = torch.zeros(rows.ENTRIES, n, device=device)
    predicted = torch.empty(n if terms.predictions else 0, dtype=torch.int64, device=device)
    sides = both_sides(student, teacher) | inverses(divergence) | {"table": table, "n": n}
    wanted = {
        "labels": terms.labels,
        "teacher_labels": terms.labels if terms.teacher_labels is None else terms.teacher_labels,
        "smoothing": terms.smoothing,
        "KIND": kind_of(divergence),
        "WANT_CE": terms.cross_entropy,
        "WANT_TEACHER_CE": terms.teacher_labels is not None,
        "BLOCK": BLOCK,
    }
    partial_columns = isinstance(distance, Carried) or sides["shared"] != sides["width"]
    launch(
        rows.statistics,
        (n,),
        **sides,
        **wanted,
        predictions=predicted,
        WANT_PREDICTIONS=terms.predictions,
        PARTIAL=partial_columns,
    )
    slopes = table  # read by rank alone
    if isinstance(divergence, Tempered):
        more_passes(divergence, sides)
    elif isinstance(divergence, Sorted) and teacher is not None:
        slopes = by_rank(student, teacher, table)

    def write(scales: Scales) -> None:
        if not student.trained and (teacher is None or not teacher.trained):
            return
        launch(
            gradients.gradient,
            (n,),
            **sides,
            **wanted,
            learn=table if scales.learn is None else scales.learn,
            slopes=slopes,
            skew=divergence.skew if isinstance(divergence, Tempered) else 0.0,
            ce_scale=float(scales.ce),
            distance_scale=float(scales.distance),
            teacher_ce_scale=float(scales.teacher_ce),
            LEARN=scales.learn is not None,
            BINS=ranks.BINS,
        )

    # Views: an index that is a list would be copied to the device, and the host would wait for it.
    correct, ce, value, teacher_ce = (
        table[each.value] for each in (rows.CORRECT, rows.CE, rows.VALUE, rows.TEACHER_CE)
    )
    return Found(correct, ce, value, predicted, teacher_ce, write)


def both_sides(student: Block, teacher: Block | None) -> dict[str, Any]:
    """Where the logits are, how wide, and what the heads do with them, as all kernels along a row want it."""
    other = student if teacher is None else teacher  # not read where there is none
    width = student.logits.shape[1]
    return {
        "student": student.logits,
        "teacher": other.logits,
        "width": width,
        "shared": min(width, other.logits.shape[1]),
        "stride": student.logits.stride(0),
        "teacher_stride": other.logits.stride(0),
        **head_arguments(student.head),
        **head_arguments(other.head, "teacher_"),
    }


def head_arguments(head: Head, prefix: str = "") -> dict[str, Any]:
    capped = {f"{prefix.upper()}CAPPED": head.softcap is not None}
    return {f"{prefix}scale": float(head.scale), f"{prefix}cap": float(head.softcap or 0.0), **capped}


def kind_of(distance: Distance | None) -> str:
    match distance:
        case Tempered():
            return distance.divergence
        case ToLabel():
            return "label"
        case Sorted():
            return "sorted"
        case _:
            return "none"


def inverses(distance: Distance | None) -> dict[str, float]:
    """What both sides' logits are multiplied with for a distance."""
    match distance:
        case Tempered():
            return {"inverse": 1 / distance.temperature, "teacher_inverse": 1 / distance.teacher_divisor}
        case ToLabel():
            return {"inverse": 1 / distance.temperature, "teacher_inverse": 1.0}
        case _:
            return {"inverse": 1.0, "teacher_inverse": 1.0}


def more_passes(divergence: Tempered, sides: dict[str, Any]) -> None:
    """What takes more than one pass over the logits before the gradient."""
    grid, kind = (sides["n"],), divergence.divergence
    if kind == "adaptive_kl":
        bits = 16 if sides["teacher"].dtype == torch.bfloat16 else 32
        launch(tails.tails, grid, **sides, alpha=divergence.alpha, BITS=bits, BLOCK=SEARCH_BLOCK)
    elif kind not in ("forward_kl", "reverse_kl"):
        launch(rows.mixtures, grid, **sides, skew=divergence.skew, KIND=kind, BLOCK=BLOCK)


def by_rank(student: Block, teacher: Block, table: Tensor) -> Tensor:
    """The distance of sorted probabilities, into `table`; its derivative [n, BINS] for the student's logits by bin."""
    n, device = len(student.logits), student.logits.device
    counts = torch.zeros(2, n, ranks.BINS, dtype=torch.int32, device=device)
    lse = torch.empty(2, n, device=device)
    slopes = torch.empty(n, ranks.BINS, device=device)
    for side, counted, own_lse in zip((student, teacher), counts, lse, strict=True):
        logits = side.logits
        where = {"product": logits, "width": logits.shape[1], "stride": logits.stride(0)}
        launch(ranks.count, (n,), **where, counts=counted, BINS=ranks.BINS, BLOCK=BLOCK)
        launch(ranks.sum_up, (n,), counts=counted, lse=own_lse, **head_arguments(side.head), BINS=ranks.BINS)
    for own, other, keep in ((0, 1, True), (1, 0, False)):
        heads = [(student, teacher)[side].head for side in (own, other)]
        launch(
            ranks.signs,
            (n,),
            counts=counts[own],
            other_counts=counts[other],
            lse=lse[own],
            other_lse=lse[other],
            slopes=slopes,
            value=table[rows.VALUE.value],
            slope_mean=table[rows.SLOPE.value],
            **head_arguments(heads[0]),
            **head_arguments(heads[1], "other_"),
            KEEP=keep,
            BINS=ranks.BINS,
            BLOCK=RANK_BLOCK,
        )
    return slopes


def carry(distance: Carried, teacher: Block, student: Block) -> Block:
    """The teacher's logits as a block in the student's vocabulary, -inf where a token is no target."""
    n = len(teacher.logits)
    target = buffer(n, student.head.weight).fill_(-torch.inf)
    for group in distance.groups:
        run = min(CARRY_CELLS, 1 << (group.longest - 1).bit_length())
        columns = CARRY_CELLS // run
        launch(
            carried.carry,
            (-(-len(group.targets) // columns), n),
            teacher=teacher.logits,
            carried=target,
            targets=group.targets,
            starts=group.starts,
            runs=group.runs,
            sources=distance.sources,
            count=len(group.targets),
            longest=group.longest,
            stride=teacher.logits.stride(0),
            carried_stride=target.stride(0),
            **head_arguments(teacher.head),
            inverse=1 / distance.divergence.teacher_divisor,
            COLUMNS=columns,
            RUN=run,
        )
    return Block(target, Head(student.head.weight), trained=False)
