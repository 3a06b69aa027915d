"""How a run begins or goes on, and when its state is saved: what stands between the loop and `state`."""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dskd.checkpoint import directory, retention, state
from dskd.checkpoint.models import save_model
from dskd.checkpoint.staging import Staging
from dskd.config.changes import harmful
from dskd.config.errors import UserError
from dskd.config.run import RunConfig
from dskd.engine.distributed import Ranks
from dskd.engine.metrics import Monitor
from dskd.engine.preemption import Decision, Stopped
from dskd.rundir import lock
from dskd.rundir.files import as_user_error
from dskd.rundir.layout import ModelName, RunDirectory, StateName
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
        self.run, self.ranks, self.engine, self.length = run, ranks, engine, length
        self.directory = RunDirectory.of(run)
        self.staging = Staging(run.checkpoint.scratch_dir, self.directory.path, ranks.rank)
        self.kept: StateName | None = None
        """The newest state that was written."""
        self.unpublished: tuple[TrainState, dict[str, Any]] | None = None
        """The state that was written last, and its files, until all of it is in the run directory."""
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

    def keep_model(self, folder: Path, student: Any, projectors: Any, tokenizer: Any) -> None:
        """Save a model. A collective call."""
        with self.ranks.flags.during("save"):
            save_model(self.staging.local(folder), student, projectors, tokenizer, self.ranks)
        if self.ranks.is_main:
            self.staging.folder(folder)

    def keep(self, now: TrainState, monitor: Monitor) -> TrainState:
        """Save the state where that is due. A collective call.

        Where the last one is still on its way from the scratch folder, the next has to wait until it is there.

        Raises:
            Stopped: where the ranks have agreed to stop; the state is saved then.
            UserError: on all ranks, where one cannot write; the state before this one stays.
        """
        decision = self.ranks.agree(save=time.monotonic() >= self.save_at, busy=self.staging.busy)
        finished = now.step == self.length.total_steps and not now.pending
        self.due = self.due or self.is_due(now.step, decision)
        at_once = decision.stop or finished
        if at_once or not decision.busy:
            self.arrive(now)
        if at_once or (self.due and not decision.busy):
            if now.name != self.kept:
                now = replace(now, metrics_bytes=monitor.position(), finished=finished)
                self.save(now)
            self.due = False
            self.set_clock()
        if at_once:
            self.arrive(now)
        if decision.stop and not finished:
            raise Stopped(now.step)
        return now

    def save(self, now: TrainState) -> None:
        with self.ranks.flags.during("save"):
            written = state.write(self.directory.state(now.name), self.staging, self.engine, self.ranks)
        self.kept = now.name
        self.unpublished = now, written
        if not self.staging.scratch:
            self.arrive(now)

    def arrive(self, now: TrainState) -> None:
        """Wait for what is on its way on any rank, and publish the state that it belongs to. A collective call."""
        if self.unpublished is not None:
            with self.ranks.flags.during("save"):
                self.ranks.together(self.staging.wait)
                (saved, written), self.unpublished = self.unpublished, None
                self.ranks.together(lambda: self.publish(saved, written, now) if self.ranks.is_main else None)

    def publish(self, saved: TrainState, written: dict[str, Any], now: TrainState) -> None:
        """`now` may know of models that came after `saved` was written."""
        state.complete(self.directory, saved, written)
        with as_user_error(self.directory.path):
            retention.retain(self.directory, saved, self.run.checkpoint.keep_last, now.best)

    def is_due(self, step: int, decision: Decision) -> bool:
        every, epoch_done = self.run.checkpoint.every_steps, step % self.length.steps_per_epoch == 0
        return epoch_done or step == self.length.total_steps or decision.save or bool(every and step % every == 0)

    def set_clock(self) -> None:
        minutes = self.run.checkpoint.every_minutes
        self.save_at = float("inf") if minutes is None else time.monotonic() + 60 * minutes
        """Time of `time.monotonic()` from which on a state is due, on this rank's clock."""
