"""What a run directory tells about its jobs: job/job.json is what was submitted, job/starts.jsonl what became of it.

job/run.yaml, cluster.yaml   the run file and the cluster profile, resolved
job/script.sh                the batch script
job/logs/startN.rankR.log    what rank R wrote in start N
job/submitit/                submitit's files and logs; those of an array lie in OUTPUT.ROOT/arrays
job/again, job/cancel        marks: a rank asks to be started again; the user asks to stop
"""

import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import cattrs

Outcome = Literal["finished", "failed", "cancelled", "again", "lost", "running"]


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
    """Name of the state that it began from, step900; empty without one."""
    outcome: Outcome = "running"
    reason: str = ""
    ended: float | None = None

    @property
    def step(self) -> int:
        return step_of(self.state)


@dataclass(frozen=True)
class Record:
    """The job/ folder of one run directory."""

    directory: Path

    @property
    def folder(self) -> Path:
        return self.directory / "job"

    @property
    def cancel(self) -> Path:
        return self.folder / "cancel"

    def mark_ending(self, again: bool, reason: str) -> None:
        """Say how a rank ended that did not finish; the first one counts, since it is why the others ended."""
        with suppress(FileExistsError), (self.folder / "ending").open("x", encoding="utf-8") as out:
            out.write(json.dumps({"again": again, "reason": reason}) + "\n")

    def ending(self) -> tuple[bool, str] | None:
        """(whether to start again, why) of the first rank that did not finish, or None."""
        found = next(_json_lines(self.folder / "ending"), None)
        return (found["again"], found["reason"]) if found else None

    def clear_ending(self) -> None:
        (self.folder / "ending").unlink(missing_ok=True)

    def log(self, start: int, rank: int) -> Path:
        return self.folder / "logs" / f"start{start}.rank{rank}.log"

    def logs(self, rank: int) -> list[Path]:
        """The logs of one rank, in the order of the starts."""
        found = [(int(m[1]), f) for f in self.folder.glob(f"logs/start*.rank{rank}.log") if (m := _START.match(f.name))]
        return [file for _, file in sorted(found)]

    def read_job(self) -> Job | None:
        """What was submitted last, or None."""
        values = _read_json(self.folder / "job.json")
        return None if values is None else cattrs.structure(values, Job)

    def write_job(self, job: Job) -> None:
        self.write("job.json", json.dumps(asdict(job), indent=2) + "\n")

    def write(self, name: str, text: str) -> Path:
        """Write job/NAME, whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / f".{name}.{os.getpid()}"
        temporary.write_text(text, encoding="utf-8")
        return temporary.replace(self.folder / name)

    def starts(self) -> list[Start]:
        """All starts of all submissions, in order. One that never told its end while a later one exists was lost."""
        found: list[Start] = []
        for entry in _json_lines(self.folder / "starts.jsonl"):
            if "outcome" not in entry:
                found.append(Start(**entry))
            elif found and found[-1].number == entry["number"]:
                found[-1] = replace(found[-1], **entry)
        return [lost(start) if start.outcome == "running" else start for start in found[:-1]] + found[-1:]

    def add_start(self, job: str, nodes: str) -> Start:
        start = Start(len(self.starts()) + 1, job, time.time(), nodes, self.state())
        begun = {f.name: getattr(start, f.name) for f in fields(Start)[:5]}
        self._append(begun)
        return start

    def end_start(self, number: int, outcome: Outcome, reason: str) -> None:
        self._append({"number": number, "outcome": outcome, "reason": reason, "ended": time.time()})

    def _append(self, entry: dict[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "starts.jsonl").open("ab", buffering=0) as out:
            out.write((json.dumps(entry) + "\n").encode())

    def state(self) -> str:
        """Name of the last complete state, empty without one."""
        try:
            return (self.directory / "resume" / "LATEST").read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            return ""

    def state_step(self) -> int:
        """Step of the last complete state, 0 without one."""
        return step_of(self.state())

    def rougel(self) -> float | None:
        """ROUGE-L of a finished evaluation."""
        results = _read_json(self.directory / "results.json")
        return None if results is None else float(results["rougel"]["mean"])

    def is_complete(self) -> bool:
        """Whether a run has made its last step, or an evaluation has its results."""
        if self.rougel() is not None:
            return True
        state = _read_json(self.directory / "resume" / self.state() / "state.json") or {}
        return bool(state.get("finished"))


def step_of(state: str) -> int:
    """step900, or step900 with a word after it -> 900."""
    found = re.match(r"step(\d+)", state)
    return int(found[1]) if found else 0


def lost(start: Start) -> Start:
    return replace(start, outcome="lost", reason="stopped by Slurm: a lost node, the end of a limit, or by hand")


_START = re.compile(r"start(\d+)\.rank\d+\.log$")


def _read_json(file: Path) -> dict[str, Any] | None:
    try:
        values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return values


def _json_lines(file: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a file that may be missing, or be written to at this moment."""
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(value, dict):
            yield value
