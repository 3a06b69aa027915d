"""The most memory that a rank has in use in a training step, phase by phase, as this code and DeepSpeed go about it.

What it is made of is exact where it follows from shapes (weights, gradients, optimizer, head, chunks of the loss), and
an upper bound where it depends on the batch: a micro-batch is as long as its longest record may be.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

from dskd.config.engine import EngineConfig
from dskd.config.models import TeacherBackend
from dskd.plan.activations import Batch, kept_activations, layer_bytes, running_layer
from dskd.plan.method import MethodCost
from dskd.plan.shape import ModelShape

FP32, MB = 4, 2**20
BUCKET = 500_000_000
"""Numbers of DeepSpeed's buffer for gradients on their way (reduce_bucket_size); a GPU has all of it from the start."""
LIVE = 1_000_000_000
"""Weights that ZeRO-3 keeps whole between uses (stage3_max_live_parameters)."""
PREFETCH = 50_000_000
"""Weights that ZeRO-3 gathers at a time (stage3_prefetch_bucket_size)."""
CHUNK_TOKENS = {True: 4096, False: 512}
"""Tokens of a chunk of the loss at most, on a GPU and on a CPU."""
BLOCK_NUMBERS, BLOCK_COPIES = 2**19, 6
"""Of a block on a CPU, and how many tensors are as large while a distance and its gradient are computed."""
TEACHER_TOKENS = 2**14
"""Tokens that go through a layer of a sharded teacher together."""
PROCESS, PROCESS_ZERO = {True: 1200 * MB, False: 60 * MB}, {True: 0, False: 48 * MB}
"""On a GPU the CUDA context and buffers of NCCL; on a CPU what a start allocates besides tensors, and ZeRO more."""
SLACK = {True: 0.1, False: 0.0}
"""Share that a GPU's allocator may lose to fragments: assumed, not measured."""


@dataclass(frozen=True)
class Parts:
    """Bytes of a rank."""

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    teacher: int = 0
    loss: int = 0
    other: int = 0

    @property
    def total(self) -> int:
        return sum(getattr(self, each.name) for each in fields(self))

    def __add__(self, more: "Parts") -> "Parts":
        return Parts(*(getattr(self, each.name) + getattr(more, each.name) for each in fields(self)))


@dataclass(frozen=True)
class Step:
    """All that the memory of a training step follows from."""

    student: ModelShape
    trained: int
    """Weights of the student and projectors that are trained."""
    teacher: ModelShape | None
    method: MethodCost
    engine: EngineConfig
    backend: TeacherBackend
    ranks: int
    micro_batches: int
    batch: Batch
    responses: int
    """Response tokens of the micro-batch."""
    on_gpu: bool
    quantized: bool = False
    """Whether a resident teacher's layers take a byte a weight."""
    measured_activations: float = 1.0
    """What measuring has found them to be, as a share of what is computed here."""

    @property
    def size(self) -> int:
        """Bytes of a number."""
        return 2 if self.engine.precision == "bf16" else FP32

    @property
    def trains_student(self) -> bool:
        """All of it, and not an adapter or projectors alone."""
        return self.trained >= self.student.weights

    @property
    def share(self) -> int:
        """Ranks that optimizer and gradients are split over."""
        return self.ranks if self.engine.zero_stage else 1

    @property
    def is_bf16(self) -> bool:
        return self.engine.precision == "bf16"


def peak(step: Step) -> Parts:
    """The parts at the moment when they are most, with what a process needs besides tensors."""
    most = highest(step)
    return replace(most, other=most.other + process(step) + round(SLACK[step.on_gpu] * most.total))


def highest(step: Step) -> Parts:
    """Tensors alone, as torch counts them on a GPU."""
    return max(phases(step).values(), key=lambda parts: parts.total)


def process(step: Step) -> int:
    """Bytes of a rank besides tensors."""
    return PROCESS[step.on_gpu] + (PROCESS_ZERO[step.on_gpu] if step.engine.zero_stage else 0)


def phases(step: Step) -> dict[str, Parts]:
    """What is in use at each moment of a step that may be the highest."""
    held = standing(step) + Parts(teacher=teacher_held(step))
    between = held + Parts(gradients=accumulated(step) if step.micro_batches > 1 else 0)
    kept = round(step.measured_activations * activations(step))
    with_activations = between + Parts(activations=kept, weights=gathered(step))
    head, size = step.student.head_weights, step.size
    transient = running_layer(step.student, step.batch, size)
    if step.engine.gradient_checkpointing:
        transient += layer_bytes(step.student, step.batch, size, step.on_gpu)
    return {
        "teacher": between + Parts(teacher=teacher_running(step)),
        "gather": with_activations + Parts(weights=in_flight(step)),
        "loss": with_activations + Parts(loss=max(loss_passes(step))),
        "attention": with_activations + attention(step),
        "backward": with_activations + Parts(activations=transient, loss=head * size, gradients=first_in_bucket(step)),
        "reduce": held + Parts(gradients=reducing(step), weights=gathered(step)),
        "update": held + Parts(gradients=accumulated(step) // updaters(step), optimizer=updating(step)),
    }


def standing(step: Step) -> Parts:
    """Weights and optimizer, between steps."""
    stage, offload = step.engine.zero_stage, step.engine.offload
    weights = (step.trained + (0 if step.trains_student else step.student.weights)) * step.size
    if stage == 3:
        weights = 0 if offload == "all" else weights // step.ranks
    optimizer = 0 if offload != "none" else optimizer_bytes(step)
    buffers = step.trained * step.size // step.ranks + bucket(step, step.trained) if stage == 3 else 0
    return Parts(weights=weights, optimizer=optimizer, gradients=buffers, other=step.method.kept)


def optimizer_bytes(step: Step) -> int:
    """Both moments in fp32, and fp32 weights, which DeepSpeed keeps a copy of even in fp32 but for ZeRO-0."""
    master = FP32 if step.is_bf16 or step.engine.zero_stage else 0
    return step.trained * (master + 2 * FP32) // step.share


def gathered(step: Step) -> int:
    """Weights that ZeRO-3 has whole while bodies and heads run."""
    return min(step.student.weights, LIVE) * step.size if step.engine.zero_stage == 3 else 0


def in_flight(step: Step) -> int:
    """Weights that ZeRO-3 has received in one piece and copies to their places."""
    return min(step.student.weights, PREFETCH) * step.size if step.engine.zero_stage == 3 else 0


def accumulated(step: Step) -> int:
    """Gradients that wait for the end of the step."""
    if step.engine.offload != "none" or step.engine.zero_stage == 3:
        return 0  # on the host; or in a buffer that is always there
    return step.trained * step.size // (step.ranks if step.engine.zero_stage == 2 else 1)


def bucket(step: Step, numbers: int) -> int:
    """Bytes in use of DeepSpeed's bucket once so many gradients have gone into it."""
    if not step.engine.zero_stage:
        return 0
    return (BUCKET if step.on_gpu else min(numbers, BUCKET)) * step.size


def first_in_bucket(step: Step) -> int:
    """Bytes of the bucket when the backward pass has just begun, with the head's gradient; ZeRO-3 has it always."""
    return 0 if step.engine.zero_stage == 3 else bucket(step, step.student.head_weights)


def reducing(step: Step) -> int:
    """Gradients while the last of them are averaged over the ranks."""
    size, stage = step.size, step.engine.zero_stage
    if stage == 3:
        return 0
    if stage:
        return accumulated(step) + bucket(step, step.trained)
    return step.trained * size + (min(step.trained, BUCKET) * size if step.ranks > 1 else 0)


def updaters(step: Step) -> int:
    """Ranks that the gradients have been split over when weights are updated, where they were not before."""
    return step.ranks if step.engine.zero_stage == 1 else 1


def updating(step: Step) -> int:
    """fp32 gradients of what this rank updates; AdamW is a fused kernel, which takes nothing beside them."""
    if step.engine.offload != "none" or not (step.engine.zero_stage or step.is_bf16):
        return 0
    return FP32 * (step.trained // step.share)


def activations(step: Step) -> int:
    """What the student's forward pass keeps, and hidden states of the response tokens."""
    kept = kept_activations(step.student, step.batch, step.size, step.engine.gradient_checkpointing, step.on_gpu)
    wide = step.teacher.hidden if step.teacher else 0
    return kept + step.responses * step.size * (2 * step.student.hidden + 3 * wide)


def loss_passes(step: Step) -> Iterator[int]:
    """Bytes of the loss in each of its passes over the response tokens; see `losses/streaming.py`."""
    head, room = step.student.head_weights if step.trains_student else 0, step.engine.loss_memory_mb * MB
    widened = step.is_bf16 and FP32 * head <= room  # the head's gradient, while it is summed
    summed = head * (FP32 if widened else step.size)
    logit = step.size if step.on_gpu else FP32
    for widths in step.method.streams:
        chunk = max(1, min(step.responses, CHUNK_TOKENS[step.on_gpu], room // (logit * sum(widths))))
        buffers = logit * chunk * sum(widths)
        if step.on_gpu:
            beside = step.size * chunk * step.method.beside
            yield summed + max(buffers + beside, head * step.size if widened else 0)
        else:
            cast = step.size * chunk * max(widths) if step.is_bf16 else 0
            product = head * (step.size + FP32) if widened else 0  # of a chunk, widened before it is added
            yield summed + buffers + max(BLOCK_COPIES * FP32 * min(BLOCK_NUMBERS, chunk * max(widths)), cast + product)


def attention(step: Step) -> Parts:
    """Attention between the models in the backward pass, a group of records at a time; see `losses/dskd_cma.py`."""
    room = step.engine.loss_memory_mb * MB
    group = min(step.method.attention * step.responses, max(step.method.attention * step.batch.tokens, room))
    head, projectors = step.student.head_weights * step.size, step.method.projectors * step.size
    return Parts(loss=head + group, gradients=projectors)


def teacher_held(step: Step) -> int:
    """Bytes of the teacher on a rank between its runs."""
    if step.teacher is None:
        return 0
    head = step.teacher.head_weights * step.size
    if step.backend == "cache":
        return head
    if step.backend == "resident":
        saved = (step.size - 1) * step.teacher.body_weights if step.quantized else 0
        return step.teacher.weights * step.size - saved
    states = step.micro_batches * step.responses * step.teacher.hidden * step.size
    return head + (step.teacher.weights * step.size - head) // step.ranks + states


def teacher_running(step: Step) -> int:
    """Bytes more while it runs: a layer's temporaries, and of a sharded one two layers whole."""
    if step.teacher is None or step.backend == "cache":
        return 0
    tokens = step.batch.positions
    if step.backend == "sharded":
        tokens = max(tokens, min(TEACHER_TOKENS, step.micro_batches * tokens))
    together = Batch(max(1, tokens // step.batch.tokens), step.batch.tokens)
    layers = 2 * max(step.teacher.layer_weights, step.teacher.head_weights) if step.backend == "sharded" else 0
    return running_layer(step.teacher, together, step.size) + layers * step.size
