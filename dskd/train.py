"""The training run: `train` is the loop, `train_step` one optimizer step."""

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from pathlib import Path

import torch

from dskd.config.errors import UserError
from dskd.config.run import RunConfig
from dskd.config.training import TrainConfig
from dskd.data.batch import Batch
from dskd.data.loader import Steps, evaluation_batches, load_steps
from dskd.engine.checkpoint import Saved, Scores, best_of, model_name
from dskd.engine.distributed import Ranks
from dskd.engine.keeper import Keeper, opened
from dskd.engine.metrics import LOG, Monitor
from dskd.engine.preemption import Stopped, ignore_signals
from dskd.engine.state import Progress
from dskd.engine.watch import watching
from dskd.engine.zero import (
    gathered,
    set_learning_rates,
    step_at_boundary,
)
from dskd.evaluate import answer_all, mean_scores
from dskd.losses.tensors import LossOutput, Scale, Sum, Tokens
from dskd.models.views import ModelView
from dskd.prepare import Prepared, kinds_for, prepare


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
    """One optimizer step, number `step` from 1; returns its figures, the same on every rank."""
    started = time.monotonic()
    ranks, engine, method = job.ranks, job.engine, job.distiller.method
    tokens = ranks.sum_int(sum(len(batch.student.labels) for batch in micro_batches))
    batches = [batch.to(ranks.device) for batch in micro_batches]
    teachers: Iterable[Tokens | None] = (teacher_tokens(job.teacher, batch) for batch in batches)
    if method.counts_itself and len(batches) > 1:
        teachers = list(teachers)
    scale = part_scale(job, tokens, len(batches), teachers)
    rates = learning_rates(job.run.train, step, job.total_steps)
    set_learning_rates(engine, rates)
    method.start_step()
    outputs: list[LossOutput] = []
    for index, (batch, teacher) in enumerate(zip(batches, teachers, strict=True), start=1):
        output = engine(batch, teacher, scale)
        engine.backward(output.loss)
        outputs.append(output)
        if index < len(micro_batches):
            engine.step()  # counts the micro-batch; the weights are still untouched
    means = total(outputs, ranks)
    refuse_non_finite(step, means, micro_batches, outputs, ranks)
    grad_norm = step_at_boundary(engine)
    seconds = time.monotonic() - started
    return {
        "loss": sum(weight * means[part] for part, weight in method.weights.items()),
        **means,
        **rates,
        "grad_norm": grad_norm,
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "seconds": seconds,
    }


@torch.no_grad()
def teacher_tokens(teacher: ModelView | None, batch: Batch) -> Tokens | None:
    return None if teacher is None else teacher.tokens(batch.teacher)._replace(pairs=batch.pairs)


def part_scale(job: Prepared, tokens: int, micro_batches: int, teachers: Iterable[Tokens | None]) -> Scale:
    """The one place where sums become means: what each part's sum in a micro-batch is multiplied with.

    It is the part's weight, divided by the tokens that it is over in the global batch, and undoes DeepSpeed's averaging
    over ranks and micro-batches. `tokens` are the response tokens of the global batch.
    """
    ranks, method = job.ranks, job.distiller.method
    undo = ranks.world_size * micro_batches

    def divided(counts: Mapping[str, int]) -> dict[str, float]:
        return {part: weight * undo / max(counts[part], 1) for part, weight in method.weights.items()}

    def over_ranks(counts: Mapping[str, int]) -> dict[str, int]:
        found = ranks.sum(torch.tensor(list(counts.values()), device=ranks.device)).tolist()
        return dict(zip(counts, found, strict=True))

    if not method.counts_itself:
        scales = divided(dict.fromkeys(method.weights, tokens))
    elif micro_batches == 1:
        return lambda own: divided(over_ranks(own))
    else:
        with gathered(job.view.output, method):
            ahead = [method.count_ahead(teacher) for teacher in teachers if teacher is not None]
        counts = over_ranks({part: sum(own[part] for own in ahead) for part in ahead[0]})
        scales = divided(dict.fromkeys(method.weights, tokens) | counts)
    return lambda own: scales


def total(outputs: Sequence[LossOutput], ranks: Ranks) -> dict[str, float]:
    """Means of all parts and metrics over micro-batches and ranks, with one collective."""
    sums = [output.parts | output.metrics for output in outputs]
    names = list(sums[0])
    values = [torch.stack([each[name].value for each in sums]).sum() for name in names]
    counts = torch.tensor([float(sum(each[name].tokens for each in sums)) for name in names])
    found = torch.cat([torch.stack(values).double(), counts.to(values[0].device, torch.float64)])
    both = ranks.sum_and_agree(found).tolist()
    return {name: both[i] / max(both[len(names) + i], 1.0) for i, name in enumerate(names)}


def refuse_non_finite(
    step: int, means: Mapping[str, float], batches: Sequence[Batch], outputs: Sequence[LossOutput], ranks: Ranks
) -> None:
    """Stop at the first loss that is not a number, before it reaches the weights, naming part and records."""
    if all(math.isfinite(means[part]) for part in outputs[0].parts):
        return
    own = [
        (name, batch.records)
        for batch, output in zip(batches, outputs, strict=True)
        for name, part in output.parts.items()
        if not math.isfinite(float(part.value))
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
        output = engine(batch.to(ranks.device), None, lambda own: {"ce": 1.0})
        empty = LossOutput(nothing, *(dict.fromkeys(sums, Sum(nothing, 0)) for sums in output[1:]))
        outputs.append(output if counts else empty)
    means = total(outputs, ranks)
    rougel = exact_match = None
    if run.eval.generate:
        student = job.distiller.student
        answers = answer_all(
            student, job.dev.student, job.dev.records, run.eval.generation, run.train.seed, ranks, run.data.bos
        )
        rougel, exact_match = mean_scores(answers)
    engine.train()
    return Scores(means["ce"], means["accuracy"], rougel, exact_match)


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
    if job.teacher is not None and run.method.teacher == "any" and job.train.teacher is None:
        fitting = ", ".join(kinds_for("same_vocabulary"))
        LOG.info(
            f"method.kind: {run.method.kind} is for two vocabularies, and these two models share one: {fitting} fit"
        )
