"""How a run begins or goes on, and when its state is saved: what stands between the loop and `state`."""

import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent import futures
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dskd.checkpoint import directory, retention, state
from dskd.checkpoint.host_memory import reserve
from dskd.checkpoint.models import model_files
from dskd.checkpoint.staging import Staging
from dskd.config.changes import harmful
from dskd.config.errors import UserError
from dskd.config.run import RunConfig
from dskd.engine.distributed import Ranks
from dskd.engine.metrics import Monitor
from dskd.engine.preemption import Decision, Stopped
from dskd.rundir import lock
from dskd.rundir.files import Manifest, as_user_error, publish
from dskd.rundir.layout import ModelName, RunDirectory, StateName, beside
from dskd.rundir.read import RunLength, has_ended
from dskd.rundir.train_state import TrainState


@dataclass(frozen=True)
class Past:
    """What earlier starts of the run have left."""

    changes: dict[str, str] | None
    """Settings that changed since; None for a new run."""
    folder: Path | None
    """The state to go on from; None begins at step 0."""
    state: TrainState
    notes: tuple[str, ...]
    """What the log should tell."""

    @property
    def finished(self) -> bool:
        return self.state.finished and not harmful(self.changes or {})


@contextmanager
def opened(run: RunConfig, ranks: Ranks, force: bool) -> Iterator[Past]:
    """Hold the run directory, find what is in it, and repeat what a kill may have left undone. A collective call.

    Raises `UserError` on all ranks where another process holds it, or it belongs to another run.
    """
    own = RunDirectory.of(run)
    with ExitStack() as stack:
        ranks.together(lambda: stack.enter_context(lock.held(own, print)) if ranks.is_main else None)
        changes = ranks.together(lambda: directory.changes(run, force) if ranks.is_main else None)[0]
        if changes is None:
            yield Past(None, None, TrainState(), ())
            return
        found = state.find(own, ranks)
        mended = ranks.together(lambda: mend(own, found, run.checkpoint.keep_last) if ranks.is_main else None)[0]
        best, notes = mended
        told = [f"changed: {key}: {change}" for key, change in changes.items()]
        now = with_models(found.state, best)
        if now.finished and not has_ended(own, now):
            now = replace(now, finished=False)
        if now.pending and not found.state.pending:
            now = replace(now, metrics_bytes=directory.before_evaluation(own, now))
        yield Past(changes, found.folder, now, (*told, *found.notes, *notes))


def mend(own: RunDirectory, found: state.Found, keep_last: int) -> tuple[list[str], list[str]]:
    """Set aside what is damaged, and delete what does not stay; the models that are sound, and what to tell."""
    with as_user_error(own.path):
        for folder in found.damaged:
            retention.put_aside(folder)
        if found.folder is None:
            return [], []
        state.name_latest(own, found.folder)  # others than the core read it as well
        best, notes = retention.sound_models(own, found.state.best)
        retention.retain(own, replace(found.state, best=best), keep_last)
    return [saved.folder for saved in best], notes


def with_models(found: TrainState, sound: Sequence[str]) -> TrainState:
    """A state without the models that are lost.

    The evaluation after its step is done again where that had saved one of them, or a finished run would have none.
    """
    lost = [saved for saved in found.best if saved.folder not in sound]
    best = tuple(saved for saved in found.best if saved.folder in sound)
    own = any((name := ModelName.parse(saved.folder)) is not None and name.step == found.step for saved in lost)
    again = own or (found.finished and not best)
    return replace(found, best=best, pending=found.pending or again, finished=found.finished and not again)


class CheckpointManager:
    """Saves a run's state when it is due, and brings it back."""

    def __init__(self, run: RunConfig, ranks: Ranks, engine: Any, length: RunLength) -> None:
        """A collective call."""
        self.run, self.ranks, self.engine, self.length = run, ranks, engine, length
        self.directory = RunDirectory.of(run)
        self.staging = Staging(run.checkpoint.scratch_dir, self.directory.path, ranks.rank)
        self.copies = reserve(engine, ranks)
        self.kept: StateName | None = None
        """The newest state that was saved, or is on its way."""
        self.on_the_way = False
        """Whether any rank may still be writing, or may have failed to."""
        self.unpublished: tuple[TrainState, futures.Future[Manifest]] | None = None
        """The state that was saved last, and this rank's file of it, until all of it is in the run directory."""
        self.due = False
        self.notes: list[str] = []
        """What the log should tell of the state that was loaded."""
        self.set_clock()

    def restore(self, past: Past) -> TrainState:
        """Load the state that was found, and make the run directory what it was then, or a new one. Collective."""
        total = self.length.total_steps
        if past.state.step > total:
            raise UserError(f"train: the run has made {past.state.step} steps, more than {total}")
        if past.folder is not None:
            self.notes = state.load(past.folder, self.engine, self.run.train.seed, self.ranks)
            self.kept = past.state.name
        told = self.ranks.together(lambda: self.prepare_directory(past) if self.ranks.is_main else None)[0]
        self.notes += told or []
        return past.state

    def prepare_directory(self, past: Past) -> list[str]:
        """On the main rank; what the log should tell."""
        notes = directory.write_settings(self.run, self.length)
        with as_user_error(self.directory.path):
            directory.clean(self.directory)
            directory.cut_metrics(self.directory, past.state.metrics_bytes)
        return notes

    def close(self) -> None:
        """Before the run directory is given back: nothing is written to it any more."""
        self.staging.close()

    def keep_model(self, folder: Path, student: Any, projectors: Any, tokenizer: Any) -> None:
        """Save a model: whole or not at all. A collective call, from which training goes on while it is written."""
        with self.ranks.flags.during("save"):
            files = model_files(student, projectors, tokenizer, self.copies.model, self.ranks)
            if self.ranks.is_main:
                partial = beside(folder, "partial")
                written = self.staging.write(partial, files, self.copies.model)
                self.staging.submit(lambda: publish_model(partial, folder, written))
        self.on_the_way = True

    def keep(self, now: TrainState, monitor: Monitor) -> TrainState:
        """Save the state where that is due. A collective call.

        Where the last one is still on its way, the next has to wait until it is there.

        Raises:
            Stopped: where the ranks have agreed to stop; the state is saved then.
            UserError: on all ranks, where one could not write this state or the one before; the last whole one stays.
        """
        decision = self.ranks.agree(save=time.monotonic() >= self.save_at)
        finished = now.step == self.length.total_steps and not now.pending
        self.due = self.due or self.is_due(now.step, decision)
        at_once = decision.stop or finished
        self.arrive(now, at_once)
        if at_once or (self.due and self.unpublished is None):
            if now.name != self.kept:
                now = replace(now, metrics_bytes=monitor.position(), finished=finished)
                self.save(now)
            self.due = False
            self.set_clock()
        while at_once and self.on_the_way:
            self.arrive(now, wait=True)
        if decision.stop and not finished:
            raise Stopped(now.step)
        return now

    def save(self, now: TrainState) -> None:
        folder = self.directory.state(now.name)
        with self.ranks.flags.during("save"):
            written = state.write(folder, self.staging, self.copies.state, self.engine, self.ranks)
        self.kept = now.name
        self.unpublished, self.on_the_way = (now, written), True
        self.arrive(now, wait=False)  # it has, where there was no memory for a copy

    def arrive(self, now: TrainState, wait: bool) -> None:
        """Look, or wait, whether what is on its way has been written on all ranks, and begin to publish a whole state.

        A collective call. `now` may know of models that came after that state was saved. Raises `UserError`.
        """
        if not self.on_the_way:
            return
        with self.ranks.flags.during("save"):
            found = self.ranks.together(lambda: self.arrived(wait))
        self.on_the_way = any(busy for busy, _ in found)
        if self.unpublished is not None and all(files is not None for _, files in found):
            (saved, _), self.unpublished, self.on_the_way = self.unpublished, None, True
            files = {name: entry for _, own in found for name, entry in own.items()}
            if self.ranks.is_main:
                self.staging.submit(lambda: self.publish(saved, files, now))

    def arrived(self, wait: bool) -> tuple[bool, Manifest | None]:
        """Whether this rank still writes, and its file of the unpublished state where that is written."""
        busy = self.staging.busy(wait)
        written = None if self.unpublished is None else self.unpublished[1]
        return busy, written.result() if written is not None and written.done() else None

    def publish(self, saved: TrainState, files: Manifest, now: TrainState) -> None:
        """On the main rank, in the thread, after all that was saved before."""
        state.complete(self.directory, saved, files)
        with as_user_error(self.directory.path):
            retention.retain(self.directory, saved, self.run.checkpoint.keep_last, now.best)

    def is_due(self, step: int, decision: Decision) -> bool:
        every, epoch_done = self.run.checkpoint.every_steps, step % self.length.steps_per_epoch == 0
        return epoch_done or step == self.length.total_steps or decision.save or bool(every and step % every == 0)

    def set_clock(self) -> None:
        minutes = self.run.checkpoint.every_minutes
        self.save_at = float("inf") if minutes is None else time.monotonic() + 60 * minutes
        """Time of `time.monotonic()` from which on a state is due, on this rank's clock."""


def publish_model(partial: Path, folder: Path, written: "futures.Future[Manifest]") -> None:
    """In the thread. Nothing of a model stays that could not be written."""
    try:
        with as_user_error(folder):
            publish(partial, folder, written.result())
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
