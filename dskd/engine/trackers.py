"""Live trackers: wandb and mlflow get what metrics.jsonl gets, from a thread of their own.

They talk to servers, which may be slow or away: training never waits for one and never fails with one. What they miss
is in metrics.jsonl.
"""

import hashlib
import importlib
import importlib.util
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Mapping
from typing import Protocol

from dskd.config.changes import flat
from dskd.config.load import to_plain
from dskd.config.run import RunConfig

WAITING = 10_000
"""Lines that may wait to be sent; what comes while so many do is left out."""
CLOSE_SECONDS = 10.0
"""The longest that the end of a start waits for a tracker."""
Figures = Mapping[str, float | int | str]
Tell = Callable[[str], None]


class Sender(Protocol):
    """One tracker's package."""

    def send(self, step: int, figures: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class Wandb:
    """wandb's run of this run directory; the same one after a restart."""

    def __init__(self, run: RunConfig) -> None:
        wandb = importlib.import_module("wandb")
        # Neither the output, nor the source, nor its git remote: they may hold what is nobody else's business.
        quiet = wandb.Settings(console="off", disable_git=True, disable_code=True, save_code=False, silent=True)
        self.run = wandb.init(
            project=run.report.project,
            name=name_of(run),
            group=f"{run.directory.parts[-3]}/{run.method.kind}",
            id=identity(run),
            resume="allow",
            dir=str(run.directory),
            config=to_plain(run),
            settings=quiet,
        )
        self.run.define_metric("*", step_metric="step")  # of the run; wandb's own counter cannot go back

    def send(self, step: int, figures: dict[str, float]) -> None:
        self.run.log({"step": step, **figures})

    def close(self) -> None:
        self.run.finish()


class Mlflow:
    """mlflow's run of this run directory; the same one after a restart."""

    def __init__(self, run: RunConfig) -> None:
        tracking = importlib.import_module("mlflow")
        self.entities = importlib.import_module("mlflow.entities")
        self.client = tracking.MlflowClient()
        project = run.report.project
        experiment = self.client.get_experiment_by_name(project)
        place = self.client.create_experiment(project) if experiment is None else experiment.experiment_id
        earlier = self.client.search_runs([place], filter_string=f"tags.dskd = '{identity(run)}'", max_results=1)
        if earlier:
            self.id = earlier[0].info.run_id
            self.client.update_run(self.id, status="RUNNING")
            return
        self.id = self.client.create_run(place, tags={"dskd": identity(run)}, run_name=name_of(run)).info.run_id
        settings = [(key, str(value)[:500]) for key, value in flat(to_plain(run))]
        for first in range(0, len(settings), 100):  # the most that a server takes at a time
            params = [self.entities.Param(key, value) for key, value in settings[first : first + 100]]
            self.client.log_batch(self.id, params=params)

    def send(self, step: int, figures: dict[str, float]) -> None:
        now = int(time.time() * 1000)
        self.client.log_batch(self.id, metrics=[self.entities.Metric(k, v, now, step) for k, v in figures.items()])

    def close(self) -> None:
        self.client.set_terminated(self.id)


SENDERS: dict[str, Callable[[RunConfig], Sender]] = {"wandb": Wandb, "mlflow": Mlflow}


def open_trackers(run: RunConfig, tell: Tell) -> "list[LiveTracker]":
    """Those that the run asks for and that are installed; `tell` takes a line for each that is not."""
    found = [name for name in run.report.trackers if importlib.util.find_spec(name) is not None]
    for name in run.report.trackers:
        if name not in found:
            tell(f"report.trackers: {name} gets nothing, it is not installed here: pip install {name}")
    return [LiveTracker(name, run, tell) for name in found]


class LiveTracker:
    """A tracker in a thread: begins there, sends there, and after its first error is left alone.

    Args:
        tell: takes a line that says what went wrong.
    """

    def __init__(self, name: str, run: RunConfig, tell: Tell) -> None:
        self.name, self.run, self.tell = name, run, tell
        self.waiting: queue.Queue[Figures | None] = queue.Queue(WAITING)
        self.thread = threading.Thread(target=self.work, name=name, daemon=True)
        self.thread.start()

    def write(self, figures: Figures) -> None:
        """Send a line of metrics.jsonl when there is time."""
        if self.thread.is_alive() and not self.waiting.full():
            self.waiting.put_nowait(figures)

    def work(self) -> None:
        try:
            sender = SENDERS[self.name](self.run)
            while (figures := self.waiting.get()) is not None:
                numbers = {k: float(v) for k, v in figures.items() if k != "step" and not isinstance(v, str)}
                sender.send(int(figures["step"]), numbers)
            sender.close()
        except BaseException as error:  # some of them leave by SystemExit
            self.tell(f"report.trackers: {self.name} gets nothing more: {redacted(error)}")

    def close(self) -> None:
        """Let it send what waits, within some seconds."""
        deadline = time.monotonic() + CLOSE_SECONDS
        while self.thread.is_alive() and time.monotonic() < deadline:
            try:
                self.waiting.put(None, timeout=0.1)
                break
            except queue.Full:
                continue
        self.thread.join(max(0.0, deadline - time.monotonic()))
        if self.thread.is_alive():
            self.tell(
                f"report.trackers: {self.name} has not taken all within {CLOSE_SECONDS:.0f} s; it misses the rest"
            )


def name_of(run: RunConfig) -> str:
    return "/".join(run.directory.parts[-3:])


def identity(run: RunConfig) -> str:
    """Of a run directory, for servers: the same after each restart, and nothing of the path can be read from it."""
    return hashlib.sha256(os.fsencode(run.directory)).hexdigest()[:24]


def redacted(error: BaseException) -> str:
    """An error in one line without the passwords in addresses, and the values of variables that are secrets."""
    text = re.sub(r"://[^/@\s]*@", "://***@", " ".join(str(error).split()))
    for name, value in os.environ.items():
        if re.search(r"KEY|TOKEN|PASSW|SECRET|CREDENTIAL", name, re.IGNORECASE) and len(value) > 3:
            text = text.replace(value, "***")
    return f"{type(error).__name__}: {text[:200]}"
