"""What a method adds to a run: projectors, and vocabulary-sized work on response tokens."""

from dataclasses import dataclass, replace

from dskd.config.methods import DskdV2Config, MethodConfig
from dskd.plan.shape import ModelShape

RANK_NUMBERS = 8 * 2**13
"""Four tables of uld, each of 2**13 bins in fp32, which are two numbers in bf16."""
GROUP_BYTES = 32
"""Of attention between the models, for each number in the hidden states of both sides; see `losses/dskd_cma.py`."""


@dataclass(frozen=True, kw_only=True)
class MethodCost:
    """D and V are hidden size and vocabulary of the teacher, d and v those of the student."""

    streams: tuple[tuple[int, ...], ...]
    """Widths of the logits that are held at a time, one tuple for each pass over the response tokens."""
    head_flops: int
    """For a response token."""
    step_flops: int = 0
    """For each step on every rank, whatever its batch."""
    projectors: int = 0
    """Trained weights."""
    kept: int = 0
    """Bytes of what it computes once, or once a step, and keeps."""
    beside: int = 0
    """Numbers that a token of a chunk takes beside its logits on a GPU: of this chunk, and of the last one still."""
    attention: int = 0
    """Bytes of a token of the records that the backward pass of attention between the models has at a time."""


def method_cost(method: MethodConfig, student: ModelShape, teacher: ModelShape | None) -> MethodCost:
    """Matrix products as the modules of `dskd/losses` do them: 2 x V x D in a head's forward and in each gradient."""
    own = 2 * student.head_weights  # one product of the student's head with a token
    if teacher is None:
        return MethodCost(streams=((student.vocabulary,),), head_flops=3 * own)
    other, both = 2 * teacher.head_weights, (student.vocabulary, teacher.vocabulary)
    if method.kind in ("kd", "uld", "mined"):
        beside = {"kd": 0, "uld": RANK_NUMBERS, "mined": 2 * student.vocabulary}[method.kind]
        return MethodCost(streams=(both,), head_flops=3 * own + other, beside=beside)
    d, wide = student.hidden, teacher.hidden
    # The student's three, two of the projected teacher, two of the projected student, one of the teacher.
    dual = MethodCost(
        streams=((teacher.vocabulary,) * 2, (student.vocabulary,) * 2),
        head_flops=5 * own + 3 * other + 12 * d * wide,
        projectors=2 * d * wide,
    )
    if method.kind == "dskd_cma":  # a third projector
        return replace(dual, projectors=6 * d * wide, attention=GROUP_BYTES * (d + wide))
    if not isinstance(method, DskdV2Config):
        return dual
    dual = replace(dual, head_flops=dual.head_flops + own + other)
    if method.projector_init == "random":
        return dual
    inverse = 8 * wide * wide
    step_flops = 2 * d * wide * (min(both) + wide)
    return replace(dual, projectors=d * wide, kept=inverse + 4 * d * wide, step_flops=step_flops)
