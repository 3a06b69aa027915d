"""What stands before the first step: data, models and method, checked, around one DeepSpeed engine."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dskd.checkpoint import randomness
from dskd.checkpoint.shards import check_pieces
from dskd.config.errors import UserError
from dskd.config.methods import DualSpaceConfig, MethodConfig, SftConfig, TeacherNeed
from dskd.config.run import RunConfig, accumulation_steps
from dskd.data.alignment import aligner
from dskd.data.batch import Batch
from dskd.data.budget import Budget
from dskd.data.loader import Collator, Plan
from dskd.data.records import Records
from dskd.data.tokenization import Limits
from dskd.data.vocabulary_map import exact_ids, load_or_build
from dskd.engine.distributed import Ranks
from dskd.engine.metrics import progress_bar
from dskd.engine.records import read_run_records
from dskd.engine.zero import (
    build_engine,
    deepspeed_config,
    gathered,
    partitioned_loading,
)
from dskd.losses import METHODS, kernels
from dskd.losses.method import Method
from dskd.losses.sft import Sft
from dskd.losses.tensors import LossOutput, MethodContext, ScaleParts, Tokens
from dskd.models import compilation
from dskd.models.load import load_projectors, load_student, load_tokenizers
from dskd.models.views import (
    ModelBody,
    ModelEnds,
    ModelView,
    check_view,
    check_vocabulary,
    response_tokens,
    try_packing,
)
from dskd.rundir.files import as_user_error
from dskd.rundir.read import RunLength
from dskd.teachers.backends import load_teacher
from dskd.teachers.cache.read import check_complete
from dskd.teachers.cached import CachedTeacher
from dskd.teachers.resident import ResidentTeacher
from dskd.teachers.sharded import ShardedTeacher
from dskd.teachers.teacher import Teacher


class Distiller(nn.Module):
    """What DeepSpeed trains: the student, and the method with its projectors. The teacher is not in it."""

    def __init__(self, student: nn.Module, body: ModelBody, method: Method[Any], context: MethodContext) -> None:
        super().__init__()
        self.student, self.method = student, method
        self.cross_entropy = Sft(SftConfig(), context)
        self.body = body

    def forward(self, batch: Batch, teacher: Tokens | None, scale_parts: ScaleParts) -> LossOutput:
        """The method's loss while training, plain cross-entropy in evaluation."""
        student = response_tokens(self.body.states(batch.student), batch.student)
        loss: LossOutput = (self.method if self.training else self.cross_entropy)(student, teacher, scale_parts)
        return loss


@dataclass(frozen=True)
class Training:
    """Everything that a run trains with."""

    run: RunConfig
    ranks: Ranks
    engine: Any
    """DeepSpeed's, around a Distiller."""
    ends: ModelEnds
    """The student's."""
    teacher: Teacher | None
    plan: Plan
    length: RunLength
    train: Collator
    dev: Collator
    notes: tuple[str, ...] = ()
    """What the log says before the first step."""

    @property
    def distiller(self) -> Distiller:
        module: Distiller = self.engine.module
        return module


def assemble(run: RunConfig, ranks: Ranks) -> Training:
    """Read the data, load the models, build the engine, and check that all of it fits together."""
    accumulation = accumulation_steps(run, ranks.world_size)
    limits = Limits(run.data.max_length, run.data.max_prompt_length, run.data.bos)
    tokenizer, teacher_tokenizer = load_tokenizers(run, limits)
    train_records, dev_records = (
        read_run_records(run, file, tokenizer, ranks) for file in (run.data.train, run.data.dev)
    )
    plan = plan_of(run, train_records)
    torch.manual_seed(run.train.seed)

    teacher, other_tokenizer, student_ids, stored = None, None, None, None
    if run.teacher is not None and run.method.teacher != "none":
        if teacher_tokenizer is not tokenizer:
            other_tokenizer = teacher_tokenizer
            refuse_other_vocabulary(run.method)
            student_ids = aligned_vocabulary(run, teacher_tokenizer, tokenizer, ranks)
        teacher = load_teacher(run, run.teacher, teacher_tokenizer, ranks)
    if isinstance(teacher, CachedTeacher):
        stored = teacher.stored
        check_complete(stored, train_records, teacher_tokenizer, limits, ranks)

    config = deepspeed_config(run, ranks.world_size, accumulation)
    with partitioned_loading(config):
        student = load_student(run.student, run.engine.precision, run.engine.gradient_checkpointing)
    view = ModelView(student, "student.path")
    check_vocabulary(view, tokenizer)
    dual_space = run.method if isinstance(run.method, DualSpaceConfig) else None
    if dual_space is not None and dual_space.projectors_only:
        student.requires_grad_(False)
    teacher_ends = None if teacher is None else teacher.ends
    context = MethodContext(view.ends, teacher_ends, run.engine.loss_memory_mb, student_ids)
    with gathered(view.ends.output):
        method = METHODS[run.method.kind](run.method, context)
    if dual_space is not None and dual_space.projectors_from is not None:
        load_projectors(method, dual_space.projectors_from)
    engine = build_engine(Distiller(student, view.body, method, context), method, run, config)
    check_pieces(engine, ranks)
    check_view(view)
    engine.train()  # transformers loads models for evaluation, without dropout
    randomness.seed(run.train.seed + ranks.rank)  # dropout differs between the ranks
    align = aligner(run.method.alignment, other_tokenizer, tokenizer) if other_tokenizer is not None else None
    train_data = Collator(train_records, tokenizer, other_tokenizer, limits, align, stored)
    dev_data = Collator(dev_records, tokenizer, None, limits)
    notes: list[str] = []
    if run.train.micro_batch_tokens is not None:
        problem = why_padded([view, *views_of(teacher)], run.data.max_length, ranks)
        notes = [] if problem is None else [f"train.micro_batch_tokens: micro-batches have padding, since {problem}"]
        train_data.packed = problem is None
        budget = Budget(run.train.micro_batch_tokens, train_data.lengths, train_data.packed)
        plan = replace(plan, budget=budget)
    length = length_of(run, plan)
    notes += compile_models(run, view, teacher, ranks)  # last: other forms than those of a step compile nothing
    return Training(run, ranks, engine, view.ends, teacher, plan, length, train_data, dev_data, tuple(notes))


def views_of(teacher: Teacher | None) -> list[ModelView]:
    """The teacher's view, where it runs here."""
    return [teacher.view] if isinstance(teacher, ResidentTeacher | ShardedTeacher) else []


def why_padded(views: Sequence[ModelView], longest: int, ranks: Ranks) -> str | None:
    """Let bodies run without padding; None where all of them can, on all ranks. A collective call."""
    tried = ((view, try_packing(view, longest)) for view in views)
    own = [f"{view.key}, a {type(view.causal).__name__}, needs it: {problem}" for view, problem in tried if problem]
    return next((problem for problems in ranks.gather(own) for problem in problems), None)


def compile_models(run: RunConfig, student: ModelView, teacher: Teacher | None, ranks: Ranks) -> list[str]:
    """Compile the layers of both models where that works; tells what is not as fast as it could be. Collective."""
    if ranks.device.type not in compilation.DEVICES:
        return []
    notes: list[str] = []
    slow = next(filter(None, ranks.gather(kernels.problem(ranks.device))), None)
    if slow is not None:
        notes.append(f"the loss takes its slow path on this GPU: {slow}")
    if run.engine.compile == "off":
        return notes
    why = next(filter(None, ranks.gather(compilation.problem(ranks.device))), None)
    if why is not None:
        return [*notes, f"engine.compile: nothing is compiled: {why}"]
    if run.engine.zero_stage == 3:
        notes.append("engine.compile: the student is not compiled under ZeRO-3, which shards its layers")
    else:
        compilation.compile_layers(student)
    quantized = run.teacher is not None and run.teacher.quantize != "none"
    if isinstance(teacher, ResidentTeacher) and not quantized:
        compilation.compile_layers(teacher.view)
    elif isinstance(teacher, ResidentTeacher | ShardedTeacher):
        notes.append("engine.compile: the teacher is not compiled: it is sharded or quantized")
    return notes


def length_of(run: RunConfig, plan: Plan) -> RunLength:
    steps = plan.steps_per_epoch * run.train.epochs
    return RunLength(min(steps, run.train.max_steps or steps), plan.steps_per_epoch)


def plan_of(run: RunConfig, records: Records) -> Plan:
    size = run.train.global_batch_size
    if len(records) < size:
        raise UserError(f"train.global_batch_size: {size} is more than the {len(records)} records of {run.data.train}")
    return Plan(records.sizes, run.train.seed, size, run.train.micro_batch_size)


def refuse_other_vocabulary(method: MethodConfig) -> None:
    if method.teacher == "same_vocabulary":
        raise UserError(
            f"method.kind: {method.kind} needs one vocabulary, and student and teacher have different tokenizers; "
            f"methods for two: {', '.join(kinds_for('any'))}"
        )


def kinds_for(teacher: TeacherNeed) -> list[str]:
    return sorted(kind for kind, other in MethodConfig.kinds.items() if other.teacher == teacher)


def aligned_vocabulary(run: RunConfig, teacher: Any, student: Any, ranks: Ranks) -> Tensor | None:
    """The student's token of each teacher token, [V] or -1, where the method needs it; made by the main rank."""
    if run.method.alignment == "none":
        return None
    if run.method.alignment == "exact":
        return torch.from_numpy(exact_ids(teacher, student))
    folder = run.cache_folder
    for turn in (True, False):  # the main rank makes it, the others read it
        if ranks.is_main is turn:
            with progress_bar("vocabulary map") as progress, as_user_error(folder, "data.cache_dir"):
                found = load_or_build(folder, teacher, student, progress)
        ranks.barrier()
    return torch.from_numpy(found.student_ids.astype(np.int64))
