"""The training run: `train` is the loop, `train_step` one optimizer step."""

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from pathlib import Path

import torch

from dskd.assemble import Training, assemble, kinds_for
from dskd.checkpoint.manager import CheckpointManager, opened
from dskd.config.errors import UserError
from dskd.config.hub import model_name
from dskd.config.run import RunConfig
from dskd.config.training import TrainConfig
from dskd.data.batch import Batch
from dskd.data.loader import Collator, Steps, evaluation_batches, load_steps
from dskd.data.tokenization import count_cut
from dskd.engine.distributed import Ranks
from dskd.engine.metrics import LOG, Monitor
from dskd.engine.preemption import Stopped, ignore_signals
from dskd.engine.zero import accumulate, gathered, set_learning_rates, step_at_boundary
from dskd.evaluation.answers import Answering, answer_all, mean_scores
from dskd.losses.tensors import LossOutput, ScaleParts, Sum, Tokens
from dskd.models.views import response_tokens
from dskd.rundir.layout import ModelName, RunDirectory
from dskd.rundir.train_state import SavedModel, Scores, TrainState, best_of
from dskd.teachers.teacher import Teacher

LOOKED_AT = 500
"""Training records that tell how many are cut."""


def train(run: RunConfig, ranks: Ranks, force: bool = False) -> Path:
    """Train to the end, going on where an earlier start of the same run stopped; returns the run directory.

    Args:
        force: go on even with settings that make it another run.

    Raises:
        UserError: for what the user can mend.
        Stopped: when asked to stop; the state is saved.
    """
    directory = RunDirectory.of(run)
    with ExitStack() as stack:
        past = stack.enter_context(opened(run, ranks, force))
        if past.finished:
            if ranks.is_main:
                print(*past.notes, sep="\n", end="\n" if past.notes else "")
                print(f"{directory.path}: finished already; best model {past.state.best[0].folder}")
            return directory.path
        training = assemble(run, ranks)
        manager = stack.enter_context(closing(CheckpointManager(run, ranks, training.engine, training.length)))
        state = manager.restore(past)
        ranks.flags.phase = "step"
        ranks.stop_if_asked()
        total, steps = training.length.total_steps, Steps(training.plan, training.train, ranks.rank, ranks.world_size)
        pin_memory = ranks.device.type == "cuda"
        batches = load_steps(steps, state.step, total, run.data.workers, pin_memory, ignore_signals)
        monitor = stack.enter_context(Monitor(directory, total, ranks.is_main, state.step, run))
        announce(training, state, [*past.notes, *manager.notes, *training.notes])
        LOG.info(manager.copies.told)
        if state.step:
            state = manager.keep(evaluate_if_due(training, manager, monitor, state), monitor)
        stack.enter_context(closing(batches))
        for step, micro_batches in enumerate(batches, start=state.step + 1):
            monitor.step({"step": step, "epoch": epoch_of(training, step)} | train_step(training, step, micro_batches))
            state = replace(state, step=step, pending=is_due(training, step))
            state = manager.keep(evaluate_if_due(training, manager, monitor, state), monitor)
        if ranks.is_main:
            best = state.best[0]
            LOG.info(f"finished: best model {directory.path / best.folder} ({best.scores})")
    return directory.path


def evaluate_if_due(training: Training, manager: CheckpointManager, monitor: Monitor, state: TrainState) -> TrainState:
    """Evaluate where that is due and not done, and save one of the best models; a stop leaves it for the next start."""
    if not state.pending:
        return state
    try:
        training.ranks.stop_if_asked()
        scores = evaluate_dev(training)
    except Stopped:
        return state
    refuse_wild(state.step, "the dev loss", math.isfinite(scores.loss))
    run, epoch = training.run, epoch_of(training, state.step)
    folder = RunDirectory.of(run).model(ModelName(epoch, state.step, scores.loss, scores.rougel))
    new = SavedModel(folder.name, scores)
    best = best_of([*state.best, new], run.checkpoint.best_by, run.checkpoint.keep_best)
    if new in best:
        manager.keep_model(folder, training.distiller.student, training.distiller.method, training.dev.student)
    monitor.write({"step": state.step} | {f"dev_{k}": v for k, v in asdict(scores).items() if v is not None})
    LOG.info(
        f"epoch {epoch}  {scores}  " + (f"saved {folder}" if new in best else f"not saved: {best[-1].folder} stays")
    )
    return replace(state, pending=False, best=best)


def epoch_of(training: Training, step: int) -> int:
    return (step - 1) // training.length.steps_per_epoch + 1


def train_step(training: Training, step: int, micro_batches: Sequence[Batch]) -> dict[str, float]:
    """One optimizer step, number `step` from 1; returns its figures, the same on every rank."""
    started = time.monotonic()
    ranks, engine, method = training.ranks, training.engine, training.distiller.method
    tokens = ranks.sum_int(sum(len(batch.student.labels) for batch in micro_batches))
    batches = [batch.to(ranks.device) for batch in micro_batches]
    teachers = teacher_tokens(training.teacher, batches)
    looks_ahead = method.looks_ahead and training.plan.budget is not None
    if looks_ahead or (method.counts_itself and len(batches) > 1):
        teachers = list(teachers)
    scale_parts = part_scale(training, tokens, len(batches), teachers)
    rates = learning_rates(training.run.train, step, training.length.total_steps)
    set_learning_rates(engine, rates)
    method.start_step()
    if looks_ahead:
        method.look_ahead([teacher for teacher in teachers if teacher is not None], ranks.sum)
    outputs: list[LossOutput] = []
    for index, (batch, teacher) in enumerate(zip(batches, teachers, strict=True), start=1):
        accumulate(engine, is_last=index == len(batches))
        output = engine(batch, teacher, scale_parts)
        engine.backward(output.loss)
        outputs.append(output)
    means = total(outputs, ranks, {"padding": padding(micro_batches)})
    refuse_non_finite(step, means, micro_batches, outputs, ranks)
    grad_norm = step_at_boundary(engine)
    refuse_wild(step, f"the gradient (norm {grad_norm})", math.isfinite(grad_norm) and grad_norm >= 0)
    seconds = time.monotonic() - started
    return {
        "loss": sum(weight * means[part] for part, weight in method.weights.items()),
        **means,
        **rates,
        "grad_norm": grad_norm,
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "seconds": seconds,
        **gpu_memory(ranks.device),
    }


def gpu_memory(device: torch.device) -> dict[str, float]:
    """The most that this rank has held so far, in GiB; nothing without a GPU."""
    return {"gpu_gib": torch.cuda.max_memory_allocated(device) / 2**30} if device.type == "cuda" else {}


def teacher_tokens(teacher: Teacher | None, batches: Sequence[Batch]) -> Iterable[Tokens | None]:
    """The teacher's side of each micro-batch, made just before it is needed; None without a teacher."""
    if teacher is None:
        return [None] * len(batches)
    sides = zip(teacher.states(batches), batches, strict=True)
    return (response_tokens(states, batch.teacher, batch.pairs) for states, batch in sides)


def part_scale(training: Training, tokens: int, micro_batches: int, teachers: Iterable[Tokens | None]) -> ScaleParts:
    """The one place where sums become means: what each part's sum in a micro-batch is multiplied with.

    It is the part's weight, divided by the tokens that it is over in the global batch, and undoes DeepSpeed's averaging
    over ranks and what it takes for the number of micro-batches. `tokens` are the response tokens of the global batch.
    """
    ranks, method = training.ranks, training.distiller.method
    undo = ranks.world_size * training.engine.gradient_accumulation_steps()

    def divided(counts: Mapping[str, int]) -> dict[str, float]:
        return {part: weight * undo / max(counts[part], 1) for part, weight in method.weights.items()}

    def over_ranks(counts: Mapping[str, int]) -> dict[str, int]:
        return dict(zip(counts, ranks.sum_ints(list(counts.values())), strict=True))

    if not method.counts_itself:
        scales = divided(dict.fromkeys(method.weights, tokens))
    elif micro_batches == 1:
        return lambda own: divided(over_ranks(own))
    else:
        with gathered(training.ends.output, method):
            ahead = [method.count_ahead(teacher) for teacher in teachers if teacher is not None]
        counts = over_ranks({part: sum(own[part] for own in ahead) for part in ahead[0]})
        scales = divided(dict.fromkeys(method.weights, tokens) | counts)
    return lambda own: scales


def padding(micro_batches: Sequence[Batch]) -> tuple[int, int]:
    """Places of this rank's micro-batches, not yet on a GPU, where the student has padding; and all of its places."""
    places = sum(batch.student.input_ids.numel() for batch in micro_batches)
    return places - sum(int(batch.student.attention_mask.sum()) for batch in micro_batches), places


def total(
    outputs: Sequence[LossOutput], ranks: Ranks, shares: Mapping[str, tuple[int, int]] | None = None
) -> dict[str, float]:
    """Means of all parts and metrics over micro-batches and ranks, with one collective.

    Args:
        shares: more of them, each as this rank's sum and what it is divided by.
    """
    sums = [output.parts | output.metrics for output in outputs]
    names = list(sums[0])
    values = [torch.stack([each[name].value for each in sums]).sum() for name in names]
    counts = [sum(each[name].tokens for each in sums) for name in names]
    above, below = zip(*shares.values(), strict=True) if shares else ((), ())
    known = torch.tensor([*above, *counts, *below], dtype=torch.float64)
    found = torch.cat([torch.stack(values).double(), known.to(values[0].device)])
    both, names = ranks.sum(found).tolist(), [*names, *(shares or ())]
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


def refuse_wild(step: int, what: str, finite: bool) -> None:
    """Stop where a loss was finite and what came of it is not: such weights reach no state and no saved model."""
    if not finite:
        raise UserError(
            f"step {step}: {what} is not finite; nothing is saved of it, and the last state stays as it is. "
            "A lower train.lr, train.clip above 0, or engine.precision=fp32 may help"
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


def is_due(training: Training, step: int) -> bool:
    """Whether an evaluation and a saved model follow `step`."""
    per_epoch = training.length.steps_per_epoch
    epoch_done = step % per_epoch == 0 and (step // per_epoch) % training.run.eval.every_epochs == 0
    return epoch_done or step == training.length.total_steps


@torch.no_grad()
def evaluate_dev(training: Training) -> Scores:
    """Dev loss and token accuracy of the student, and ROUGE-L of its answers where the run asks for it."""
    run, ranks, engine = training.run, training.ranks, training.engine
    engine.eval()
    outputs, nothing = [], torch.zeros((), device=ranks.device)
    for batch, counts in evaluation_batches(training.dev, run.eval.generation.batch_size, ranks.rank, ranks.world_size):
        ranks.stop_if_asked()
        output = engine(batch.to(ranks.device), None, lambda own: {"ce": 1.0})
        empty = LossOutput(nothing, *(dict.fromkeys(sums, Sum(nothing, 0)) for sums in output[1:]))
        outputs.append(output if counts else empty)
    means = total(outputs, ranks)
    rougel = exact_match = None
    if run.eval.generate:
        student, dev, generation = training.distiller.student, training.dev, run.eval.generation
        answering = Answering(student, dev.student, generation, ranks, run.data.bos)
        answers = answer_all(answering, dev.records, run.train.seed)
        rougel, exact_match = mean_scores(answers)
    engine.train()
    return Scores(means["ce"], means["accuracy"], rougel, exact_match)


def told_of_cuts(data: Collator) -> Iterator[str]:
    """How many records the limits cut, by a look at some from all over the file: training begins at once."""
    records, limits = data.records, data.limits
    looked_at = [records[i] for i in range(0, len(records), max(1, len(records) // LOOKED_AT))]
    for side, tokenizer in (("student", data.student), ("teacher", data.teacher)):
        prompts, responses = (0, 0) if tokenizer is None else count_cut(tokenizer, looked_at, limits)
        if prompts or responses:
            yield (
                f"{side}: of {len(looked_at)} records looked at, {prompts} lose the beginning of their prompt "
                f"(data.max_prompt_length {limits.max_prompt_length}) and {responses} the end of their response "
                f"(data.max_length {limits.max_length})"
            )


def announce(training: Training, state: TrainState, notes: Sequence[str]) -> None:
    run, student, total = training.run, training.distiller.student, training.length.total_steps
    trained = sum(getattr(p, "ds_numel", p.numel()) for p in student.parameters() if p.requires_grad)
    LOG.info(
        f"{run.method.kind}: {model_name(run.student.path)}, {trained / 1e6:.1f} M trained weights, "
        f"{len(training.train.records)} records, {total} steps of {run.train.global_batch_size}, "
        f"{training.ranks.world_size} rank(s) on {training.ranks.device.type}, ZeRO-{run.engine.zero_stage}, "
        f"{run.engine.precision}"
    )
    for note in (*notes, *(told_of_cuts(training.train) if training.ranks.is_main else ())):
        LOG.warning(note)
    if state.step:
        LOG.info(f"going on after step {state.step}")
    if run.teacher is not None and training.teacher is None:
        LOG.info(f"teacher: ignored, method {run.method.kind} learns from none")
    if training.teacher is not None and run.method.teacher == "any" and training.train.teacher is None:
        fitting = ", ".join(kinds_for("same_vocabulary"))
        LOG.info(
            f"method.kind: {run.method.kind} is for two vocabularies, and these two models share one: {fitting} fit"
        )
