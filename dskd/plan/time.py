"""How long a run takes: the matrix products that it needs, over what a machine gets done of its peak. An estimate."""

from dskd.config.models import TeacherBackend
from dskd.plan.machine import Machine
from dskd.plan.models import Models
from dskd.plan.shape import ModelShape

TRAINED_SHARE, FROZEN_SHARE = 0.15, 0.41
"""Of a GPU's peak, measured on an H100 in bf16: forward and backward of a 1.5B student, which waits for launches of
small kernels, and the forward of a 3B teacher and the products of heads."""
CPU_SHARE = 0.7
"""Of a CPU's peak, for all."""
WITHIN_NODE, BETWEEN_NODES = 200e9, 25e9
"""Bytes a second that a rank takes in of a sharded teacher; assumed, of NVLink and of 400 Gbit/s for two GPUs."""


def run_seconds(models: Models, machine: Machine, backend: TeacherBackend, checkpointing: bool, size: int) -> float:
    """Of a whole run, the making of its cache included.

    Args:
        size: bytes of a number.
    """
    making = teacher_seconds(models, machine, backend, size) if backend == "cache" else 0.0
    return making + steps_seconds(models, machine, backend, checkpointing, size)


def steps_seconds(models: Models, machine: Machine, backend: TeacherBackend, checkpointing: bool, size: int) -> float:
    """Of all training steps."""
    epochs = models.workload.epochs
    teacher = 0.0 if backend == "cache" else teacher_seconds(models, machine, backend, size)
    return epochs * (teacher + student_seconds(models, machine, checkpointing)) + head_seconds(models, machine)


def run_flops(models: Models, machine: Machine, backend: TeacherBackend, checkpointing: bool) -> float:
    """Of a whole run on all ranks, the making of its cache included."""
    epochs = models.workload.epochs
    passes = 1.0 if backend == "cache" else epochs
    student = epochs * student_flops(models, checkpointing)
    return passes * teacher_flops(models) + student + machine.ranks * head_flops(models, machine)


def student_seconds(models: Models, machine: Machine, checkpointing: bool) -> float:
    """Of an epoch in the student's body."""
    share = TRAINED_SHARE if machine.on_gpu else CPU_SHARE
    return student_flops(models, checkpointing) / (machine.ranks * machine.flops * share)


def student_flops(models: Models, checkpointing: bool) -> float:
    """Of an epoch in the student's body: a backward costs two forwards, and checkpointing one forward more."""
    passes = 4 if checkpointing else 3
    return passes * models.workload.padded_tokens * forward_flops(models.student, models.workload.longest)


def head_seconds(models: Models, machine: Machine) -> float:
    """Of all steps in heads and projectors."""
    return head_flops(models, machine) / (machine.flops * (FROZEN_SHARE if machine.on_gpu else CPU_SHARE))


def head_flops(models: Models, machine: Machine) -> float:
    """Of all steps in heads and projectors on a rank; what a step costs whatever its batch, every rank does."""
    workload, method = models.workload, models.method
    tokens = workload.epochs * workload.response_tokens / machine.ranks
    return tokens * method.head_flops + workload.steps * method.step_flops


def teacher_flops(models: Models) -> float:
    """Of the teacher, once over the records."""
    if models.teacher is None:
        return 0.0
    return models.workload.padded_tokens * forward_flops(models.teacher, models.workload.longest)


def teacher_seconds(models: Models, machine: Machine, backend: TeacherBackend, size: int) -> float:
    """Of the teacher, once over the records; one that is split travels to every rank once a step meanwhile."""
    if models.teacher is None:
        return 0.0
    flops = teacher_flops(models)
    computing = flops / (machine.ranks * machine.flops * (FROZEN_SHARE if machine.on_gpu else CPU_SHARE))
    if backend != "sharded" or not machine.on_gpu:
        return computing
    link = WITHIN_NODE if machine.nodes == 1 else BETWEEN_NODES
    return max(computing, models.workload.steps / models.workload.epochs * models.teacher.weights * size / link)


def forward_flops(shape: ModelShape, length: int) -> int:
    """Of a token in the body: 2 for each weight, and attention over the half of `length` tokens that come before it."""
    return 2 * shape.body_weights + 2 * shape.layers * shape.attention_width * length
