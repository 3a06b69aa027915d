"""The jobs of a run directory as data: what was submitted, every start and how it ended, marks of both sides."""

import json
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import cattrs

from dskd.config.errors import UserError
from dskd.rundir.files import append_json, private_folder, read_json, read_json_lines, write_text
from dskd.rundir.layout import PARTIAL_ANSWERS, JobFolder, RunDirectory, StateName
from dskd.rundir.read import newest_state
from dskd.rundir.shard import read_shard

Outcome = Literal["finished", "failed", "cancelled", "again", "lost", "running"]
LOST = "stopped by Slurm: a lost node, the end of a limit, or by hand"


@dataclass(frozen=True)
class Job:
    """A submission, as job.json holds it."""

    cluster: str
    command: tuple[str, ...]
    """What each rank runs on its node."""
    nodes: int
    tasks_per_node: int
    minutes: int
    """Time limit of one start."""
    signal_seconds: int
    max_requeues: int
    id: str | None = None
    """Slurm's id, 12 or 12_3; None until sbatch has answered."""
    submitted: float = 0.0
    """Seconds since the epoch."""


@dataclass(frozen=True)
class Start:
    """One start of a job and how it ended."""

    number: int
    job: str
    time: float
    nodes: str
    state: str
    """Name of the state that it began from, step900, or of a shard record900; empty without one."""
    outcome: Outcome = "running"
    reason: str = ""
    ended: float | None = None

    @property
    def step(self) -> int:
        name = StateName.parse(self.state)
        return 0 if name is None else name.step


@dataclass(frozen=True)
class Ending:
    """How the first rank ended that did not finish; it is why the others ended."""

    again: bool
    """Whether to start again."""
    reason: str


@dataclass(frozen=True)
class Meeting:
    """How the ranks of one start find each other, and know each other."""

    port: int
    """Of the first node."""
    secret: str


@dataclass(frozen=True)
class Jobs:
    """The jobs of one run directory, or of the folder of an evaluation."""

    directory: RunDirectory

    @classmethod
    def at(cls, path: Path) -> "Jobs":
        return cls(RunDirectory(path))

    @property
    def folder(self) -> JobFolder:
        return self.directory.job

    def read(self) -> Job | None:
        """What was submitted last, or None. Raises `UserError` where job.json is damaged."""
        values = read_json(self.folder.submission)
        try:
            return None if values is None else cattrs.structure(values, Job)
        except (cattrs.BaseValidationError, TypeError, ValueError, KeyError):
            raise UserError(f"{self.folder.submission}: is damaged: it does not say what was submitted") from None

    def write(self, job: Job) -> None:
        self.write_file(self.folder.submission, json.dumps(asdict(job), indent=2) + "\n")

    def write_file(self, file: Path, text: str) -> None:
        """A file of the job folder, whole or not at all, for the user alone: a profile's environment may be secret."""
        self.make_folder()
        write_text(file, text, 0o600)

    def make_folder(self) -> None:
        private_folder(self.folder.path)

    def starts(self) -> list[Start]:
        """All starts of all submissions, in order. One that never told its end while a later one exists was lost."""
        found: list[Start] = []
        for line in read_json_lines(self.folder.starts):
            with suppress(cattrs.BaseValidationError, TypeError, ValueError, KeyError):  # a damaged line is none
                if "outcome" not in line:
                    found.append(cattrs.structure(line, Start))
                elif found and found[-1].number == line["number"]:
                    found[-1] = cattrs.structure(asdict(found[-1]) | line, Start)
        running = [start.outcome == "running" for start in found[:-1]]
        lost = [replace(s, outcome="lost", reason=LOST) if r else s for s, r in zip(found, running, strict=False)]
        return lost + found[-1:]

    def add_start(self, job: str, nodes: str) -> Start:
        start = Start(len(self.starts()) + 1, job, time.time(), nodes, self.state())
        self.append({f.name: getattr(start, f.name) for f in fields(Start)[:5]})
        return start

    def end_start(self, number: int, outcome: Outcome, reason: str) -> None:
        self.append({"number": number, "outcome": outcome, "reason": reason, "ended": time.time()})

    def append(self, line: dict[str, Any]) -> None:
        self.make_folder()
        append_json(self.folder.starts, line)

    def mark_ending(self, ending: Ending) -> None:
        """Say how a rank ended that did not finish, unless another one has."""
        with suppress(FileExistsError), self.folder.ending.open("x"):
            append_json(self.folder.ending, asdict(ending))

    def ending(self) -> Ending | None:
        """How the start ended before all ranks were done; None where none told, or what it told is damaged."""
        found = next(read_json_lines(self.folder.ending), None)
        try:
            return None if found is None else cattrs.structure(found, Ending)
        except (cattrs.BaseValidationError, TypeError, ValueError, KeyError):
            return None

    def clear_ending(self) -> None:
        self.folder.ending.unlink(missing_ok=True)

    def write_meeting(self, meeting: Meeting) -> None:
        self.write_file(self.folder.meeting, json.dumps(asdict(meeting)))

    def meeting(self) -> Meeting:
        """Raises `UserError` where the start has written none."""
        try:
            return cattrs.structure(read_json(self.folder.meeting), Meeting)
        except (cattrs.BaseValidationError, TypeError, ValueError, KeyError):
            raise UserError(f"{self.folder.meeting}: is missing or damaged: the ranks cannot find each other") from None

    def is_cancelled(self) -> bool:
        return self.folder.cancel.exists()

    def state(self) -> str:
        """Name of the last complete state, or how many records a shard of a cache or an evaluation has; or empty."""
        name, shard = newest_state(self.directory), read_shard(self.directory)
        if shard is not None:
            return f"record{shard.made}"
        answers = self.answers()
        if answers:
            return f"record{answers}"
        return "" if name is None else str(name)

    def answers(self) -> int:
        """How many answers an evaluation under way has, or a part of a file; the first line tells to what."""
        files = self.directory.path / PARTIAL_ANSWERS, self.directory.path.with_suffix(".partial")
        return max(0, *(sum(1 for _ in read_json_lines(file)) - 1 for file in files))

    def kept(self) -> str:
        """The same in words."""
        shard, answers = read_shard(self.directory), self.answers()
        if shard is not None:
            return str(shard)
        return f"{answers:,} answers" if answers else f"state at step {self.state_step()}"

    def state_step(self) -> int:
        """Step of the last complete state, 0 without one."""
        name = newest_state(self.directory)
        return 0 if name is None else name.step
