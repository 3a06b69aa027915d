"""How a run begins or goes on, and when its state is saved: what stands between the loop and `state`."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dskd.config.changes import harmful
from dskd.config.errors import UserError
from dskd.config.run import RunConfig
from dskd.engine import directory, lock, state
from dskd.engine.checkpoint import save_model
from dskd.engine.delivery import Delivery
from dskd.engine.distributed import Ranks
from dskd.engine.metrics import Monitor
from dskd.engine.preemption import Stopped
from dskd.engine.state import Progress


@dataclass(frozen=True)
class Past:
    """What earlier starts of the run have left."""

    changes: dict[str, str] | None
    """Settings that changed since; None for a new run."""
    folder: Path | None
    """The state to go on from; None begins at step 0."""
    progress: Progress
    notes: tuple[str, ...]
    """What the log should tell."""

    @property
    def finished(self) -> bool:
        return self.progress.finished and not harmful(self.changes or {})


@contextmanager
def opened(run: RunConfig, ranks: Ranks, force: bool) -> Iterator[Past]:
    """Hold the run directory, and find what is in it. A collective call.

    Raises `UserError` on all ranks where another process holds it, or it belongs to another run.
    """
    with ExitStack() as stack:
        ranks.together(lambda: stack.enter_context(lock.held(run.directory, print)) if ranks.is_main else None)
        changes = ranks.together(lambda: directory.changes(run, force) if ranks.is_main else None)[0]
        if changes is None:
            yield Past(None, None, Progress(), ())
            return
        folder, progress, notes = state.find(run.directory, ranks)
        told = [f"changed: {key}: {change}" for key, change in changes.items()]
        yield Past(changes, folder, progress, (*told, *notes))


class Keeper:
    """Saves a run's state when it is due, and brings it back."""

    def __init__(self, run: RunConfig, ranks: Ranks, engine: Any, steps_per_epoch: int, total_steps: int) -> None:
        self.run, self.ranks, self.engine = run, ranks, engine
        self.steps_per_epoch, self.total_steps = steps_per_epoch, total_steps
        self.delivery = Delivery(run.checkpoint.scratch_dir, run.directory, ranks.rank)
        ranks.flags.copying = lambda: self.delivery.busy
        self.kept: tuple[int, bool] | None = None
        """Step and pending evaluation of the newest state that was written."""
        self.unpublished: Callable[[], None] | None = None
        """Publishes the state that was written last, once all of it is in the run directory."""
        self.due = False
        self.notes: list[str] = []
        """What the log should tell of the state that was loaded."""
        self.set_clock()

    def restore(self, past: Past) -> Progress:
        """Load the state that was found, and make the run directory what it was then, or a new one. Collective."""
        if past.progress.step > self.total_steps:
            raise UserError(f"train: the run has made {past.progress.step} steps, more than {self.total_steps}")
        if past.folder is not None:
            self.notes = state.load(past.folder, self.engine, self.run.train.seed, self.ranks)
            self.kept = (past.progress.step, past.progress.pending)
        self.ranks.together(lambda: self.prepare_directory(past) if self.ranks.is_main else None)
        return past.progress

    def prepare_directory(self, past: Past) -> None:
        if past.changes is None or past.changes:
            directory.write_settings(self.run)
        directory.clean(self.run.directory)
        directory.cut_metrics(self.run.directory, past.progress.metrics_bytes)

    def keep_model(self, folder: Path, student: Any, projectors: Any, tokenizer: Any) -> None:
        """Save a model. A collective call."""
        save_model(self.delivery.local(folder), student, projectors, tokenizer, self.ranks)
        if self.ranks.is_main:
            self.delivery.folder(folder)

    def keep(self, progress: Progress, monitor: Monitor) -> Progress:
        """Save the state where that is due. A collective call.

        Where the last one is still on its way from the scratch folder, the next has to wait until it is there.

        Raises:
            Stopped: where the ranks have agreed to stop; the state is saved then.
            UserError: on all ranks, where one cannot write; the state before this one stays.
        """
        flags, finished = self.ranks.flags, progress.step == self.total_steps and not progress.pending
        self.due = self.due or self.is_due(progress.step)
        at_once = flags.stop or finished
        if at_once or not flags.busy:
            self.arrive()
        if at_once or (self.due and not flags.busy):
            if (progress.step, progress.pending) != self.kept:
                progress = replace(progress, metrics_bytes=monitor.position(), finished=finished)
                self.save(progress)
            self.due = False
            self.set_clock()
        if at_once:
            self.arrive()
        if flags.stop and not finished:
            raise Stopped
        return progress

    def save(self, progress: Progress) -> None:
        folder = state.folder_of(self.run.directory, progress)
        written = state.write(folder, self.delivery, self.engine, self.ranks)
        self.kept = (progress.step, progress.pending)

        def publish() -> None:
            state.complete(folder, progress, written, self.run.checkpoint.keep_last)
            directory.keep_models(self.run.directory, progress.best)

        self.unpublished = publish
        if not self.delivery.scratch:
            self.arrive()

    def arrive(self) -> None:
        """Wait for what is on its way on any rank, and publish the state that it belongs to. A collective call."""
        if self.unpublished is not None:
            self.ranks.together(lambda: self.delivery.wait(self.ranks.flags.moved))
            publish, self.unpublished = self.unpublished, None
            self.ranks.together(lambda: publish() if self.ranks.is_main else None)

    def is_due(self, step: int) -> bool:
        every, epoch_done = self.run.checkpoint.every_steps, step % self.steps_per_epoch == 0
        return epoch_done or step == self.total_steps or self.ranks.flags.save or bool(every and step % every == 0)

    def set_clock(self) -> None:
        minutes = self.run.checkpoint.every_minutes
        self.ranks.flags.save_at = None if minutes is None else time.monotonic() + 60 * minutes
