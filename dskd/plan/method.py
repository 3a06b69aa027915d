"""What a method adds to a run: projectors, and vocabulary-sized work on response tokens."""

from dataclasses import dataclass

from dskd.config.methods import DskdV2Config, MethodConfig
from dskd.plan.shape import ModelShape

RANK_NUMBERS = 8 * 2**13
"""Four tables of uld, each of 2**13 bins in fp32, which are two numbers in bf16."""


@dataclass(frozen=True)
class MethodCost:
    """D and V are hidden size and vocabulary of the teacher, d and v those of the student."""

    projectors: int
    """Trained weights."""
    kept: int
    """Bytes of what it computes once, or once a step, and keeps."""
    streams: tuple[tuple[int, ...], ...]
    """Widths of the logits that are held at a time, one tuple for each pass over the response tokens."""
    beside: int
    """Numbers that a token of a chunk takes beside its logits on a GPU: of this chunk, and of the last one still."""
    head_flops: int
    """For a response token."""
    step_flops: int
    """For each step on every rank, whatever its batch."""


def method_cost(method: MethodConfig, student: ModelShape, teacher: ModelShape | None) -> MethodCost:
    """Matrix products as the modules of `dskd/losses` do them: 2 x V x D in a head's forward and in each gradient."""
    own = 2 * student.head_weights  # one product of the student's head with a token
    if teacher is None:
        return MethodCost(0, 0, ((student.vocabulary,),), 0, 3 * own, 0)
    other, both = 2 * teacher.head_weights, (student.vocabulary, teacher.vocabulary)
    if method.kind in ("kd", "uld", "mined"):
        beside = {"kd": 0, "uld": RANK_NUMBERS, "mined": 2 * student.vocabulary}[method.kind]
        return MethodCost(0, 0, (both,), beside, 3 * own + other, 0)
    d, wide = student.hidden, teacher.hidden
    streams = ((teacher.vocabulary,) * 2, (student.vocabulary,) * 2)
    # The student's three, two of the projected teacher, two of the projected student, one of the teacher.
    flops = 5 * own + 3 * other + 12 * d * wide
    if not isinstance(method, DskdV2Config):
        projectors = 2 * d * wide + (4 * d * wide if method.kind == "dskd_cma" else 0)
        return MethodCost(projectors, 0, streams, 0, flops, 0)
    if method.projector_init == "random":
        return MethodCost(2 * d * wide, 0, streams, 0, flops + own + other, 0)
    inverse = 8 * wide * wide
    step_flops = 2 * d * wide * (min(both) + wide)
    return MethodCost(d * wide, inverse + 4 * d * wide, streams, 0, flops + own + other, step_flops)
