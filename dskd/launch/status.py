"""What a run is doing, and what it wrote: read from its run directory, and of submitted ones one call of Slurm."""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from dskd.config.errors import UserError
from dskd.launch import slurm
from dskd.rundir.jobs import Job, Jobs, Start
from dskd.rundir.layout import RunDirectory
from dskd.rundir.lock import holder_of
from dskd.rundir.read import (
    TAIL_BYTES,
    is_complete,
    read_length,
    read_rougel,
    read_steps,
    read_train_state,
    require_run,
)
from dskd.rundir.shard import ShardProgress, read_shard
from dskd.rundir.train_state import SavedModel, TrainState

RECENT_STEPS = 20
"""Steps over which speed is averaged."""
ENDED = ("finished", "failed", "cancelled")


@dataclass(frozen=True)
class Status:
    directory: Path
    job: str | None
    """None for a run that was started here."""
    state: str
    """One word: pending, running, again, finished, failed, cancelled, damaged, or gone where nobody knows more.

    Of a run that was started here: running, finished, stopped or damaged.
    """
    note: str
    """Why: the queue's reason, or how the run ended."""
    nodes: str
    step: int
    total_steps: int | None
    tokens_per_second: float | None
    seconds_left: float | None
    restarts: tuple[str, ...]
    """Why the run was started again, in order."""
    state_step: int
    """Step of the last complete state."""
    rougel: float | None
    """Of a finished evaluation."""
    best: SavedModel | None = None
    """The best model by the last complete state."""
    shard: ShardProgress | None = None
    """Of a shard of a teacher's cache, which has no steps."""


def runs_under(root: Path) -> list[Path]:
    """Run directories under `root`, and what else was submitted there."""
    own = RunDirectory(Path()).job.submission
    submitted = {file.parents[len(own.parts) - 1] for file in root.rglob(str(own))}
    begun = {file.parent for file in root.rglob(RunDirectory(Path()).settings.name) if file.parent.name != own.parts[0]}
    return sorted(submitted | begun)


def known_among(paths: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Those that hold a run or were submitted, and what else a pattern such as outputs/*/*/* finds.

    Raises `UserError` where none does.
    """
    found = {path: (Jobs.at(path).folder.submission, RunDirectory(path).settings) for path in paths}
    known = [path for path, files in found.items() if any(file.exists() for file in files)]
    if not known:
        for path in paths:
            require_run(path)
    return known, [path for path in paths if path not in known]


@dataclass(frozen=True)
class Submitted:
    """What a run directory tells of its last submission."""

    jobs: Jobs
    job: Job
    starts: list[Start]

    @property
    def own_starts(self) -> list[Start]:
        return [start for start in self.starts if start.job == self.job.id]

    @property
    def is_over(self) -> bool:
        """Whether the run itself wrote down how this submission ended."""
        return bool(self.starts) and self.starts[-1].job == self.job.id and self.starts[-1].outcome in ENDED


def statuses(directories: Sequence[Path]) -> list[Status]:
    """The state of each run; where a file of one is damaged, its status says so, and the others are not touched.

    Raises `UserError` for a directory that holds no run and was never submitted.
    """
    folders = [Jobs.at(directory.absolute()) for directory in directories]
    read = [read_submission(folder) for folder in folders]
    open_ids = [one.job.id for one in read if isinstance(one, Submitted) and one.job.id is not None and not one.is_over]
    queued = slurm.queue(open_ids) if open_ids else {}
    gone = [job for job in open_ids if job not in queued]
    ended = slurm.ended(gone) if gone else {}
    return [one if isinstance(one, Status) else status_of(one, queued, ended) for one in read]


def read_submission(jobs: Jobs) -> Submitted | Status:
    if not jobs.folder.submission.exists():
        require_run(jobs.directory.path)
        return local_status(jobs)
    try:
        return Submitted(jobs, require_job(jobs), jobs.starts())
    except UserError as error:
        return damaged(jobs, "", error)


def local_status(jobs: Jobs) -> Status:
    """Of a run that was started here: its lock tells whether somebody works in it."""
    directory = jobs.directory
    try:
        holder, state = holder_of(directory), read_train_state(directory)
        pace, saved = pace_of(jobs), jobs.state_step()
        word = "running" if holder else "finished" if is_complete(directory) else "stopped"
    except UserError as error:
        return damaged(jobs, None, error)
    return Status(
        directory=directory.path,
        job=None,
        state=word,
        note="",
        nodes=holder or "",
        step=saved if pace.step is None else pace.step,
        total_steps=pace.total_steps,
        tokens_per_second=pace.tokens_per_second,
        seconds_left=pace.seconds_left if holder else None,
        restarts=(),
        state_step=saved,
        rougel=None,
        best=best_in(state),
    )


def best_in(state: TrainState | None) -> SavedModel | None:
    return state.best[0] if state is not None and state.best else None


def damaged(jobs: Jobs, job: str | None, error: UserError) -> Status:
    return Status(jobs.directory.path, job, "damaged", str(error), "", 0, None, None, None, (), 0, None)


def require_job(jobs: Jobs) -> Job:
    job = jobs.read()
    if job is None:
        local = f"; what it writes is in {jobs.directory.log}" if jobs.directory.settings.is_file() else ""
        raise UserError(f"{jobs.directory.path}: not a submitted run (no job/job.json in it){local}")
    return job


def status_of(one: Submitted, queued: dict[str, slurm.QueueEntry], ended: dict[str, slurm.QueueEntry]) -> Status:
    """One run's state, from what it wrote and what Slurm says."""
    jobs, job = one.jobs, one.job
    entry = queued.get(job.id or "")
    state: str
    try:
        if one.is_over:
            last = one.starts[-1]
            state, note, nodes = last.outcome, last.reason, last.nodes
        elif entry is not None:
            state = "running" if entry.state in ("RUNNING", "COMPLETING") else entry.state.lower()
            note, nodes = ("" if state == "running" or entry.reason == "None" else entry.reason), entry.nodes
        else:
            state, note, nodes = after_the_queue(jobs, job, one.own_starts, ended.get(job.id or ""))
        pace, saved, rougel = pace_of(jobs), jobs.state_step(), read_rougel(jobs.directory.path)
        best = best_in(read_train_state(jobs.directory))
    except UserError as error:
        return damaged(jobs, job.id or "", error)
    return Status(
        directory=jobs.directory.path,
        job=job.id or "",
        state=state,
        note=note,
        nodes=nodes,
        step=saved if pace.step is None else pace.step,
        total_steps=pace.total_steps,
        tokens_per_second=pace.tokens_per_second,
        seconds_left=pace.seconds_left if state == "running" else None,
        restarts=tuple(start.reason for start in one.starts if start.outcome in ("again", "lost")),
        state_step=saved,
        rougel=rougel,
        best=best,
        shard=read_shard(jobs.directory),
    )


@dataclass(frozen=True)
class Pace:
    """How far a run is and how fast, by its metrics."""

    step: int | None
    total_steps: int | None
    tokens_per_second: float | None
    seconds_left: float | None


def pace_of(jobs: Jobs) -> Pace:
    steps, length = read_steps(jobs.directory, TAIL_BYTES), read_length(jobs.directory)
    total, recent = None if length is None else length.total_steps, steps[-RECENT_STEPS:]
    if not recent:
        return Pace(None, total, None, None)
    step, seconds = int(recent[-1]["step"]), fmean(line["seconds"] for line in recent)
    left = None if total is None else seconds * (total - step)
    return Pace(step, total, fmean(line["tokens_per_second"] for line in recent), left)


def after_the_queue(jobs: Jobs, job: Job, own: Sequence[Start], entry: slurm.QueueEntry | None) -> tuple[str, str, str]:
    """(state, note, nodes) of a job that left the queue without writing down how it ended."""
    if entry is None:
        known = f"; last known: started on {own[-1].nodes}" if own else ""
        return "gone", f"job {job.id} is neither in the queue nor in the accounting{known}", ""
    word, state = entry.state, "cancelled" if entry.state.startswith("CANCELLED") else "failed"
    if not own and state == "failed":
        note = (
            f"{word} before its first line on {entry.nodes}: is {jobs.directory.path} on storage that the nodes share?"
        )
        return state, first_words(jobs) or note, entry.nodes
    if not own:
        return state, word + (f": {entry.reason}" if entry.reason else ""), entry.nodes
    hint = "" if word != "TIMEOUT" else "; it did not stop in time: a longer signal_seconds may help"
    return state, f"{word}{hint}; {jobs.kept()}", entry.nodes


def first_words(jobs: Jobs) -> str | None:
    """dskd's own words in the batch script's log."""
    logs = sorted(jobs.folder.submitit.glob("*_0_log.err"), key=lambda file: file.stat().st_mtime)
    lines = logs[-1].read_text(errors="replace").splitlines() if logs else []
    return next((line.removeprefix("dskd: ") for line in reversed(lines) if line.startswith("dskd: ")), None)


def print_logs(directory: Path, rank: int, follow: bool, pause: float = 0.5) -> None:
    """Print what one rank wrote, start after start; with `follow` until the run has ended."""
    jobs = Jobs.at(directory.absolute())
    job = require_job(jobs)
    ranks = job.nodes * job.tasks_per_node
    if rank >= ranks:
        raise UserError(f"--rank: {directory} has ranks 0 to {ranks - 1}, got {rank}")
    shown: dict[Path, int] = {}
    while True:
        (current,) = statuses([directory]) if follow else (None,)
        for file in jobs.folder.logs(rank):
            with file.open("rb") as data:
                data.seek(shown.get(file, 0))
                text = data.read()
                shown[file] = data.tell()
            sys.stdout.buffer.write(text)
        sys.stdout.flush()
        if current is None or current.state in (*ENDED, "gone"):
            break
        time.sleep(pause)
    if not shown:
        raise UserError(f"{directory}: rank {rank} has written nothing yet; `dskd status {directory}` says why")
