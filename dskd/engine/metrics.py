"""What a run tells: train.log, metrics.jsonl, a progress bar on a terminal, TensorBoard and trackers."""

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dskd.config.run import RunConfig
from dskd.engine.trackers import LiveTracker, open_trackers
from dskd.rundir.files import as_user_error, persistently, write_all
from dskd.rundir.layout import RunDirectory

LOG = logging.getLogger("dskd")
PLAIN_SECONDS = 10.0
"""Where there is no terminal, a line at most this often."""
SHOWN = {
    "loss": "loss {:.4f}",
    "lr": "lr {:.2e}",
    "grad_norm": "gradient {:.2f}",
    "tokens_per_second": "{:.0f} tokens/s",
    "padding": "padding {:.0%}",
    "gpu_gib": "{:.1f} GiB",
}
"""Which figures of a step are shown, and how."""


class Monitor:
    """Writes a run's log and metrics on the main rank; silent on the others."""

    def __init__(
        self, directory: RunDirectory, total_steps: int, is_main: bool, done: int = 0, run: RunConfig | None = None
    ) -> None:
        """`done`: the steps that earlier starts of the run have made; `run` says which live trackers get them too."""
        self.run, self.trackers = run, list[LiveTracker]()
        self.directory, self.total_steps, self.is_main, self.done = directory, total_steps, is_main, done
        self.stack = ExitStack()
        self.last_line, self.started, self.first = 0.0, time.monotonic(), 0
        self.board: Any = None

    def __enter__(self) -> Self:
        LOG.setLevel(logging.INFO)
        LOG.propagate = False
        if not self.is_main:
            return self
        logging.raiseExceptions = False  # a disk that refuses a line of the log is told by what else is written
        self.console = Console(stderr=True)
        with as_user_error(self.directory.path):
            self.metrics = self.stack.enter_context(self.directory.metrics.open("ab", buffering=0))
            self.add_handler(logging.FileHandler(self.directory.log, encoding="utf-8"), "%(asctime)s %(message)s")
        if self.console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
                TimeRemainingColumn(),
            )
            self.progress = self.stack.enter_context(Progress(*columns, console=self.console))
            self.task = self.progress.add_task("train", total=self.total_steps, completed=self.done, figures="")
            self.add_handler(_AboveBar(self.progress), "%(message)s")
        else:
            self.add_handler(logging.StreamHandler(sys.stderr), "%(message)s")
        # TensorBoard writes in a thread of its own, whose errors are one line here and come back to us as well.
        self.stack.callback(setattr, threading, "excepthook", threading.excepthook)
        threading.excepthook = lambda failed: LOG.warning(f"thread {failed.thread}: {one_line(failed.exc_value)}")
        self.board = self.tensorboard()
        if self.run is not None:
            self.trackers = open_trackers(self.run, LOG.warning)
        return self

    def add_handler(self, handler: logging.Handler, format_: str) -> None:
        handler.setFormatter(logging.Formatter(format_))
        LOG.addHandler(handler)
        self.stack.callback(close_quietly, handler)
        self.stack.callback(LOG.removeHandler, handler)

    def tensorboard(self) -> Any:
        try:
            from torch.utils.tensorboard.writer import SummaryWriter
        except ImportError:
            return None
        try:
            return SummaryWriter(str(self.directory.tensorboard), purge_step=self.done + 1)
        except Exception as error:
            LOG.warning(f"TensorBoard gets nothing: {one_line(error)}")
            return None

    def on_board(self, do: Callable[[Any], None]) -> None:
        """What goes to TensorBoard too; where that fails it is told once, and training goes on."""
        if self.board is None:
            return
        try:
            do(self.board)
        except Exception as error:  # its writer raises later what its thread met earlier, whatever that was
            self.board = None
            LOG.warning(f"TensorBoard gets nothing more: {one_line(error)}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.on_board(lambda board: board.close())
        for tracker in self.trackers:
            tracker.close()
        self.stack.close()

    def step(self, figures: Mapping[str, float | int]) -> None:
        """One optimizer step: a line in metrics.jsonl, and the progress shown."""
        self.write(figures)
        if not self.is_main:
            return
        self.first = self.first or int(figures["step"])
        done, short = (
            int(figures["step"]),
            "  ".join(form.format(figures[k]) for k, form in SHOWN.items() if k in figures),
        )
        if self.console.is_terminal:
            self.progress.update(self.task, completed=done, figures=short)
        elif time.monotonic() - self.last_line > PLAIN_SECONDS or done == self.total_steps:
            self.last_line = time.monotonic()
            left = (self.total_steps - done) * (self.last_line - self.started) / (done - self.first + 1)
            LOG.info(f"step {done}/{self.total_steps}  {short}  about {left / 60:.1f} min left")

    def position(self) -> int:
        """Bytes of metrics.jsonl, all of them on the disk; 0 on the other ranks."""
        if not self.is_main:
            return 0
        with as_user_error(self.directory.metrics):
            persistently(lambda: os.fsync(self.metrics.fileno()))
        return os.fstat(self.metrics.fileno()).st_size

    def write(self, figures: Mapping[str, float | int | str]) -> None:
        """One object in metrics.jsonl, and the same on TensorBoard and to the trackers."""
        if not self.is_main:
            return
        with as_user_error(self.directory.path):
            write_all(self.metrics, (json.dumps(figures) + "\n").encode())
        self.on_board(lambda board: add_scalars(board, figures))
        for tracker in self.trackers:
            tracker.write(figures)


def close_quietly(handler: logging.Handler) -> None:
    with suppress(OSError):  # what it could not write is lost, and told by what else is written
        handler.close()


def add_scalars(board: Any, figures: Mapping[str, float | int | str]) -> None:
    for name, value in figures.items():
        if name != "step" and not isinstance(value, str):
            board.add_scalar(name, value, int(figures["step"]))


def one_line(error: BaseException | None) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


@contextmanager
def progress_bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """On stderr, how far something is that takes long, as a bar or as a line now and then: call with (done, total)."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lines_of_progress(label)
        return
    with Progress(TextColumn(label), BarColumn(), TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task(label)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def lines_of_progress(label: str) -> Callable[[int, int], None]:
    started = last = time.monotonic()

    def tell(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last > PLAIN_SECONDS:
            last = now
            left = (total - done) * (now - started) / max(done, 1)
            print(f"{label}: {done}/{total}  about {left / 60:.1f} min left", file=sys.stderr)

    return tell


class _AboveBar(logging.Handler):
    """Prints log lines above the progress bar instead of through it."""

    def __init__(self, progress: Progress) -> None:
        super().__init__()
        self.progress = progress

    def emit(self, record: logging.LogRecord) -> None:
        self.progress.console.print(self.format(record), markup=False, highlight=False)
