"""The training run: `train` is the loop, `train_step` one optimizer step, `prepare` what stands before both."""

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dskd.config.errors import UserError
from dskd.config.methods import MethodConfig, SftConfig
from dskd.config.run import RunConfig, accumulation_steps
from dskd.config.training import TrainConfig
from dskd.data.batch import Batch
from dskd.data.loader import Collator, Plan, Steps, evaluation_batches, load_steps
from dskd.data.records import Record, read_records
from dskd.data.tokenization import Limits, check_tokenizer
from dskd.engine import randomness
from dskd.engine.checkpoint import Saved, Scores, best_of, model_name
from dskd.engine.distributed import Ranks
from dskd.engine.keeper import Keeper, opened
from dskd.engine.metrics import LOG, Monitor
from dskd.engine.preemption import Stopped, ignore_signals
from dskd.engine.state import Progress
from dskd.engine.watch import watching
from dskd.engine.zero import build_engine, deepspeed_config, partitioned_loading, set_learning_rates, step_at_boundary
from dskd.evaluate import answer_all, mean_scores
from dskd.losses import METHODS
from dskd.losses.method import Method
from dskd.losses.sft import Sft
from dskd.losses.tensors import LossOutput, Sum, Tokens
from dskd.models.load import load_student, load_teacher, load_tokenizer
from dskd.models.views import ModelView, check_view, check_vocabulary


class Distiller(nn.Module):
    """What DeepSpeed trains: the student, and the method with its projectors. The teacher is not in it."""

    def __init__(self, student: nn.Module, view: ModelView, method: Method, memory_mb: int) -> None:
        super().__init__()
        self.student, self.method = student, method
        self.cross_entropy = Sft(SftConfig(), view, None, memory_mb)
        self._view = (view,)  # in a tuple: the view's modules are the student's

    def forward(self, batch: Batch, teacher: Tokens | None, scales: dict[str, float]) -> LossOutput:
        """The method's loss while training, plain cross-entropy in evaluation."""
        student = self._view[0].tokens(batch.student)
        loss: LossOutput = (self.method if self.training else self.cross_entropy)(student, teacher, scales)
        return loss


@dataclass(frozen=True)
class Prepared:
    """Everything a run needs beside its settings."""

    run: RunConfig
    ranks: Ranks
    engine: Any
    """DeepSpeed's, around a Distiller."""
    teacher: ModelView | None
    plan: Plan
    train: Collator
    dev: Collator
    total_steps: int

    @property
    def distiller(self) -> Distiller:
        module: Distiller = self.engine.module
        return module


def train(run: RunConfig, ranks: Ranks, force: bool = False) -> Path:
    """Train to the end, going on where an earlier start of the same run stopped; returns the run directory.

    Args:
        force: go on even with settings that make it another run.

    Raises:
        UserError: for what the user can mend.
        Stopped: when asked to stop; the state is saved.
    """
    with ExitStack() as stack:
        past = stack.enter_context(opened(run, ranks, force))
        if past.finished:
            if ranks.is_main:
                print(f"{run.directory}: finished already; best model {past.progress.best[0].folder.name}")
            return run.directory
        job = prepare(run, ranks)
        stack.enter_context(watching(ranks.flags, run.train.stall_minutes))
        keeper = Keeper(run, ranks, job.engine, job.plan.steps_per_epoch, job.total_steps)
        progress = keeper.restore(past)
        ranks.stop_if_asked()
        steps = Steps(job.plan, job.train, ranks.rank, ranks.world_size)
        workers, pin_memory = run.data.workers, ranks.device.type == "cuda"
        batches = load_steps(steps, progress.step, job.total_steps, workers, pin_memory, ignore_signals)
        monitor = stack.enter_context(Monitor(run.directory, job.total_steps, ranks.is_main, progress.step))
        announce(job, progress, [*past.notes, *keeper.notes])
        if progress.step:
            progress = keeper.keep(after_step(job, keeper, monitor, progress), monitor)
        stack.enter_context(closing(batches))
        for step, micro_batches in enumerate(batches, start=progress.step + 1):
            epoch = (step - 1) // job.plan.steps_per_epoch + 1
            monitor.step({"step": step, "epoch": epoch} | train_step(job, step, micro_batches))
            progress = replace(progress, step=step, pending=is_due(job, step))
            progress = keeper.keep(after_step(job, keeper, monitor, progress), monitor)
        if ranks.is_main:
            best = progress.best[0]
            LOG.info(f"finished: best model {best.folder} ({describe(best.scores)})")
    return run.directory


def after_step(job: Prepared, keeper: Keeper, monitor: Monitor, progress: Progress) -> Progress:
    """Evaluate and save a model where that is due and not done; a stop leaves it for the next start."""
    if not progress.pending or job.ranks.flags.stop:
        return progress
    try:
        scores = evaluate_dev(job)
    except Stopped:
        return progress
    run, step = job.run, progress.step
    epoch = (step - 1) // job.plan.steps_per_epoch + 1
    folder = run.directory / model_name(epoch, step, scores)
    keeper.keep_model(folder, job.distiller.student, job.distiller.method, job.dev.student)
    monitor.write({"step": step} | {f"dev_{k}": v for k, v in asdict(scores).items() if v is not None})
    LOG.info(f"epoch {epoch}  {describe(scores)}  saved {folder}")
    best = best_of([*progress.best, Saved(folder, scores)], run.checkpoint.best_by, run.checkpoint.keep_best)
    return replace(progress, pending=False, best=best)


def train_step(job: Prepared, step: int, micro_batches: Sequence[Batch]) -> dict[str, float]:
    """One optimizer step, number `step` from 1; returns its figures, the same on every rank.

    The one place where sums become means: each part's scale holds its weight and the division by the response tokens of
    the global batch, and undoes DeepSpeed's averaging over ranks and micro-batches.
    """
    started = time.monotonic()
    ranks, engine, method = job.ranks, job.engine, job.distiller.method
    tokens = ranks.sum_int(sum(len(batch.student.labels) for batch in micro_batches))
    undo = ranks.world_size * len(micro_batches)
    scales = {part: weight * undo / max(tokens, 1) for part, weight in method.weights.items()}
    rates = learning_rates(job.run.train, step, job.total_steps)
    set_learning_rates(engine, rates)
    outputs: list[LossOutput] = []
    for index, micro_batch in enumerate(micro_batches, start=1):
        batch = micro_batch.to(ranks.device)
        output = engine(batch, teacher_tokens(job.teacher, batch), scales)
        engine.backward(output.loss)
        outputs.append(output)
        if index < len(micro_batches):
            engine.step()  # counts the micro-batch; the weights are still untouched
    parts, metrics = total(outputs, ranks)
    refuse_non_finite(step, parts, micro_batches, outputs, ranks)
    grad_norm = step_at_boundary(engine)
    seconds = time.monotonic() - started
    means = {name: value / max(tokens, 1) for name, value in parts.items()}
    return {
        "loss": sum(method.weights[name] * mean for name, mean in means.items()),
        **means,
        **metrics,
        **rates,
        "grad_norm": grad_norm,
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "seconds": seconds,
    }


@torch.no_grad()
def teacher_tokens(teacher: ModelView | None, batch: Batch) -> Tokens | None:
    return teacher.tokens(batch.teacher) if teacher is not None else None


def total(outputs: Sequence[LossOutput], ranks: Ranks) -> tuple[dict[str, float], dict[str, float]]:
    """Summed parts and mean metrics over micro-batches and ranks, with one collective."""
    parts, metrics = list(outputs[0].parts), list(outputs[0].metrics)
    sums = [sum_of(o.parts[name] for o in outputs) for name in parts]
    sums += [sum_of(o.metrics[name].value for o in outputs) for name in metrics]
    counts = torch.tensor([float(sum(o.metrics[name].tokens for o in outputs)) for name in metrics])
    values = torch.cat([torch.stack(sums).double(), counts.to(sums[0].device, torch.float64)])
    found = ranks.sum_and_agree(values).tolist()
    n, m = len(parts), len(metrics)
    means = {name: found[n + i] / max(found[n + m + i], 1.0) for i, name in enumerate(metrics)}
    return dict(zip(parts, found, strict=False)), means


def sum_of(values: Any) -> Tensor:
    return torch.stack(list(values)).sum()


def refuse_non_finite(
    step: int, parts: Mapping[str, float], batches: Sequence[Batch], outputs: Sequence[LossOutput], ranks: Ranks
) -> None:
    """Stop at the first loss that is not a number, before it reaches the weights, naming part and records."""
    if all(math.isfinite(value) for value in parts.values()):
        return
    own = [
        (name, batch.records)
        for batch, output in zip(batches, outputs, strict=True)
        for name, value in output.parts.items()
        if not math.isfinite(float(value))
    ]
    bad = [found for part in ranks.gather(own) for found in part]
    names = ", ".join(sorted({name for name, _ in bad}))
    records = ", ".join(str(i) for i in sorted({i for _, batch in bad for i in batch}))
    raise UserError(
        f"step {step}: the loss is not finite in part {names}; micro-batch of training records {records} (from 0). "
        "A lower train.lr, engine.precision=fp32, or a look at these records may help"
    )


def learning_rates(train: TrainConfig, step: int, total_steps: int) -> dict[str, float]:
    """The rates of step 1..total_steps."""
    warmup = math.ceil(train.warmup_ratio * total_steps)
    if step <= warmup:
        factor = step / warmup
    else:
        progress = (step - 1 - warmup) / max(1, total_steps - warmup)
        shapes = {"cosine": (1 + math.cos(math.pi * progress)) / 2, "linear": 1 - progress, "constant": 1.0}
        factor = shapes[train.schedule]
    return {"lr": train.lr * factor, "projector_lr": train.projector_lr * factor}


def is_due(job: Prepared, step: int) -> bool:
    """Whether an evaluation and a saved model follow `step`."""
    per_epoch = job.plan.steps_per_epoch
    epoch_done = step % per_epoch == 0 and (step // per_epoch) % job.run.eval.every_epochs == 0
    return epoch_done or step == job.total_steps


@torch.no_grad()
def evaluate_dev(job: Prepared) -> Scores:
    """Dev loss and token accuracy of the student, and ROUGE-L of its answers where the run asks for it."""
    run, ranks, engine = job.run, job.ranks, job.engine
    engine.eval()
    outputs, nothing = [], torch.zeros((), device=ranks.device)
    for batch, counts in evaluation_batches(job.dev, run.eval.generation.batch_size, ranks.rank, ranks.world_size):
        ranks.stop_if_asked()
        output = engine(batch.to(ranks.device), None, {"ce": 1.0})
        outputs.append(output if counts else LossOutput(nothing, {"ce": nothing}, {"accuracy": Sum(nothing, 0)}))
    parts, metrics = total(outputs, ranks)
    tokens = ranks.sum_int(sum(o.metrics["accuracy"].tokens for o in outputs))
    rougel = exact_match = None
    if run.eval.generate:
        student = job.distiller.student
        answers = answer_all(
            student, job.dev.student, job.dev.records, run.eval.generation, run.train.seed, ranks, run.data.bos
        )
        rougel, exact_match = mean_scores(answers)
    engine.train()
    return Scores(parts["ce"] / max(tokens, 1), metrics["accuracy"], rougel, exact_match)


def describe(scores: Scores) -> str:
    text = f"dev loss {scores.loss:.4f}  accuracy {100 * scores.accuracy:.1f} %"
    if scores.rougel is not None:
        text += f"  ROUGE-L {scores.rougel:.2f}  exact match {scores.exact_match:.1f} %"
    return text


def announce(job: Prepared, progress: Progress, notes: Sequence[str]) -> None:
    run, student = job.run, job.distiller.student
    trained = sum(getattr(p, "ds_numel", p.numel()) for p in student.parameters() if p.requires_grad)
    LOG.info(
        f"{run.method.kind}: {run.student.path.name}, {trained / 1e6:.1f} M trained weights, "
        f"{len(job.train.records)} records, {job.total_steps} steps of {run.train.global_batch_size}, "
        f"{job.ranks.world_size} rank(s) on {job.ranks.device.type}, ZeRO-{run.engine.zero_stage}, "
        f"{run.engine.precision}"
    )
    for note in notes:
        LOG.warning(note)
    if progress.step:
        LOG.info(f"going on after step {progress.step}")
    if run.teacher is not None and job.teacher is None:
        LOG.info(f"teacher: ignored, method {run.method.kind} learns from none")


def prepare(run: RunConfig, ranks: Ranks) -> Prepared:
    """Read the data, load the models, build the engine, and check that all of it fits together."""
    accumulation = accumulation_steps(run, ranks.world_size)
    limits = Limits(run.data.max_length, run.data.max_prompt_length, run.data.bos)
    train_records, dev_records = read_records(run.data.train), read_records(run.data.dev)
    plan = plan_of(run, train_records)
    tokenizer = load_tokenizer(run.student.path, "student.path", run.student.trust_remote_code)
    check_tokenizer(tokenizer, limits, "student.path")
    torch.manual_seed(run.train.seed)

    teacher, other_tokenizer = None, None
    if run.teacher is not None and run.method.teacher != "none":
        teacher_tokenizer = load_tokenizer(run.teacher.path, "teacher.path", run.teacher.trust_remote_code)
        check_tokenizer(teacher_tokenizer, limits, "teacher.path")
        if teacher_tokenizer.get_vocab() != tokenizer.get_vocab():
            other_tokenizer = teacher_tokenizer
            refuse_other_vocabulary(run.method)
        teacher = ModelView(load_teacher(run.teacher, run.engine.precision, ranks.device), "teacher.path")
        check_vocabulary(teacher, teacher_tokenizer)
        check_view(teacher)

    config = deepspeed_config(run, ranks.world_size, accumulation)
    with partitioned_loading(config):
        student = load_student(run.student, run.engine.precision, run.engine.gradient_checkpointing)
    view = ModelView(student, "student.path")
    check_vocabulary(view, tokenizer)
    method = METHODS[run.method.kind](run.method, view, teacher, run.engine.loss_memory_mb)
    engine = build_engine(Distiller(student, view, method, run.engine.loss_memory_mb), method, run, config)
    check_view(view)
    engine.train()  # transformers loads models for evaluation, without dropout
    randomness.seed(run.train.seed + ranks.rank)  # dropout differs between the ranks
    total_steps = plan.steps_per_epoch * run.train.epochs
    total_steps = min(total_steps, run.train.max_steps or total_steps)
    train_data = Collator(train_records, tokenizer, other_tokenizer, limits)
    dev_data = Collator(dev_records, tokenizer, None, limits)
    return Prepared(run, ranks, engine, teacher, plan, train_data, dev_data, total_steps)


def plan_of(run: RunConfig, records: Sequence[Record]) -> Plan:
    size = run.train.global_batch_size
    if len(records) < size:
        raise UserError(f"train.global_batch_size: {size} is more than the {len(records)} records of {run.data.train}")
    sizes = tuple(len(record.prompt) + len(record.outputs[0]) for record in records)
    return Plan(sizes, run.train.seed, size, run.train.micro_batch_size)


def refuse_other_vocabulary(method: MethodConfig) -> None:
    if method.teacher == "same_vocabulary":
        fitting = ", ".join(sorted(kind for kind, other in MethodConfig.kinds.items() if other.teacher == "any"))
        raise UserError(
            f"method.kind: {method.kind} needs one vocabulary, and student and teacher have different tokenizers; "
            f"methods for two: {fitting}"
        )
