"""What a run will need on a machine, for each way to have its teacher."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from dskd.config.methods import DualSpaceConfig
from dskd.config.models import TeacherBackend
from dskd.config.run import RunConfig
from dskd.plan.activations import Batch
from dskd.plan.lora import adapter_weights
from dskd.plan.machine import GB, Machine
from dskd.plan.memory import Parts, Step, peak, teacher_held, teacher_running
from dskd.plan.models import Models
from dskd.plan.time import run_flops, run_seconds

BACKENDS: tuple[TeacherBackend, ...] = ("resident", "sharded", "cache")
STATE_BYTES = 12
"""Of each trained weight in a state: fp32 weights and both moments."""
HOST_PROCESS, HOST_WORKER = 4 * GB, GB
"""Host memory of a rank on a GPU and of a data worker: Python, torch, CUDA's libraries, tokenizers."""


@dataclass(frozen=True)
class Correction:
    """What measuring a run has found, as shares of what is computed."""

    activations: float = 1.0
    hours: float = 1.0


UNMEASURED = Correction()


@dataclass(frozen=True)
class Forecast:
    """One run with one backend on one machine."""

    run: RunConfig
    models: Models
    machine: Machine
    backend: TeacherBackend
    correction: Correction = UNMEASURED

    @cached_property
    def step(self) -> Step:
        run, models, workload = self.run, self.models, self.models.workload
        records, micro_batches = self.micro_batches
        lora = run.student.lora
        frozen = isinstance(run.method, DualSpaceConfig) and run.method.projectors_only
        trained = 0 if frozen else models.student.weights if lora is None else adapter_weights(models.student, lora)
        return Step(
            student=models.student,
            trained=trained + models.method.projectors,
            teacher=models.teacher,
            method=models.method,
            engine=run.engine,
            backend=self.backend,
            ranks=self.machine.ranks,
            micro_batches=micro_batches,
            batch=Batch(records, workload.longest),
            responses=min(workload.longest_responses, records * workload.longest),
            on_gpu=self.machine.on_gpu,
            quantized=run.teacher is not None and run.teacher.quantize != "none",
            measured_activations=self.correction.activations,
        )

    @property
    def micro_batches(self) -> tuple[int, int]:
        """Records of the largest micro-batch, as if all were as long as the longest, and micro-batches of a rank."""
        train, workload = self.run.train, self.models.workload
        per_rank = max(1, train.global_batch_size // self.machine.ranks)
        if train.micro_batch_tokens is None:
            records = min(train.micro_batch_size, per_rank)
            return records, max(1, per_rank // records)
        steps = max(1, workload.records / train.global_batch_size)
        records = min(math.ceil(train.micro_batch_tokens / workload.longest), per_rank)
        return records, math.ceil(workload.padded_tokens / steps / self.machine.ranks / train.micro_batch_tokens)

    @cached_property
    def memory(self) -> Parts:
        """Bytes of a rank at its highest, in training."""
        return peak(self.step)

    @cached_property
    def making(self) -> int:
        """Bytes of a rank while the cache is made, with the teacher split over the ranks; 0 with other backends."""
        if self.backend != "cache":
            return 0
        alone = replace(self.step, backend="sharded", micro_batches=1)
        return teacher_held(alone) + teacher_running(alone)

    @cached_property
    def host(self) -> int:
        """Bytes of a node's memory beside its GPUs; 0 where the ranks are on CPUs."""
        if not self.machine.on_gpu:
            return 0
        step, run = self.step, self.run
        offloaded = 0
        if run.engine.offload != "none":
            offloaded += step.trained * (4 * 4) // step.share
        if run.engine.offload == "all":
            offloaded += step.student.weights * step.size // step.ranks
        loading = step.student.weights * step.size if run.engine.zero_stage == 3 else 0
        rank = HOST_PROCESS + run.data.workers * HOST_WORKER + offloaded + loading
        return self.machine.ranks_per_node * rank

    @cached_property
    def disk(self) -> int:
        """Bytes of states, models and cache."""
        keep, step = self.run.checkpoint, self.step
        states = (keep.keep_last + 1) * STATE_BYTES * step.trained
        return states + (keep.keep_best + 1) * step.student.weights * step.size + self.cache_bytes

    @property
    def copies(self) -> int:
        """Bytes of the main rank's node for copies of a state and a model, from which they are written."""
        machine, step = self.machine, self.step
        state = STATE_BYTES * step.trained * machine.ranks_per_node // machine.ranks
        return state + step.student.weights * step.size

    @property
    def cache_bytes(self) -> int:
        """Bytes of the cache: a hidden state for each response token, and the teacher's ends."""
        teacher = self.models.teacher
        if teacher is None or self.backend != "cache":
            return 0
        return (self.models.workload.response_tokens * teacher.hidden + 2 * teacher.head_weights) * self.step.size

    @cached_property
    def hours(self) -> float:
        """Of the whole run, the making of a cache included."""
        checkpointing = self.run.engine.gradient_checkpointing
        seconds = run_seconds(self.models, self.machine, self.backend, checkpointing, self.step.size)
        return self.correction.hours * seconds / 3600

    @cached_property
    def flops(self) -> float:
        """Of the whole run on all ranks, the making of a cache included."""
        return run_flops(self.models, self.machine, self.backend, self.run.engine.gradient_checkpointing)

    @property
    def divides(self) -> bool:
        """Whether the global batch does, as `dskd.config.run.accumulation_steps` asks."""
        train = self.run.train
        each = train.micro_batch_size if train.micro_batch_tokens is None else 1
        return train.global_batch_size % (each * self.machine.ranks) == 0

    @property
    def fits(self) -> bool:
        """Whether it can run at all: memory of the ranks and of the nodes, and a global batch that divides."""
        host = self.machine.host_memory
        room = max(self.memory.total, self.making) <= self.machine.memory and (host is None or self.host <= host)
        return room and self.divides

    @cached_property
    def nodes_needed(self) -> int | None:
        """The fewest nodes on which it fits; None where more do not help."""
        return next((other.machine.nodes for other in self.on_each_number_of_nodes() if other.fits), None)

    def on_each_number_of_nodes(self) -> Iterator["Forecast"]:
        most = min(self.machine.most_nodes, self.run.train.global_batch_size // self.machine.ranks_per_node)
        for nodes in range(1, most + 1):
            yield replace(self, machine=replace(self.machine, nodes=nodes))
