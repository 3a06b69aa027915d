"""What the tests on a Slurm cluster do as a user does it, and how they look at the outcome."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from dskd.launch.ranks import rank_environment
from dskd.launch.status import Status, statuses
from dskd.rundir.jobs import Jobs

ROOT = Path(__file__).resolve().parents[2]
UP, DOWN = ROOT / "slurm/local/up", ROOT / "slurm/local/down"
LOCAL = ROOT / "slurm/clusters/local.yaml"


def bring_up(folder: Path, *options: str) -> None:
    done = subprocess.run([UP, "--folder", folder, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def dskd(*arguments: object, code: int = 0) -> str:
    """The command as a user types it: its output, or with code 2 the one line on stderr."""
    command = [sys.executable, "-m", "dskd", *map(str, arguments)]
    clean = {k: v for k, v in os.environ.items() if k not in rank_environment(0, 1, 0)}  # of the tests' own process
    done = subprocess.run(command, env=clean, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout if code == 0 else done.stderr.strip()


def submit(*arguments: object) -> list[Path]:
    """Run directories of what `dskd submit ARGUMENTS` submits."""
    return [Path(line.split(": ", 1)[1]) for line in dskd("submit", *arguments).splitlines()]


def wait_for(directory: Path, *states: str, step: int = 0, state_step: int = 0, timeout: float = 300) -> Status:
    """Wait until a run is in one of `states`, has made `step` steps, and its state of `state_step` is whole.

    A state is whole some steps after its own: it is written while training goes on.
    """
    deadline = time.monotonic() + timeout
    while True:
        (status,) = statuses([directory])
        if status.state in states and status.step >= step and status.state_step >= state_step:
            return status
        wrong = status.state in ("failed", "cancelled", "gone", "finished") or time.monotonic() > deadline
        assert not wrong, f"{status}\n{everything_said(directory)}"
        time.sleep(1)


def wait_until(condition: Callable[[], bool], timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(1)


def everything_said(directory: Path) -> str:
    files = sorted((directory / "job").rglob("*.log")) + sorted((directory / "job").rglob("*.err"))
    return "\n".join(f"--- {f.name}\n{f.read_text(errors='replace')[-1500:]}" for f in files)


def outcomes(directory: Path) -> list[tuple[str, str]]:
    return [(start.outcome, start.reason) for start in Jobs.at(directory).starts()]


def metrics(directory: Path) -> list[dict[str, object]]:
    """metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second")} for line in lines]


def step_seconds(directory: Path) -> list[float]:
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [line["seconds"] for line in lines if "seconds" in line]


def steps(directory: Path) -> list[int]:
    return [int(line["step"]) for line in metrics(directory) if "loss" in line]


def rank_environments(directory: Path) -> list[dict[str, str]]:
    """The environment of each running rank, from the processes themselves."""
    wanted, found = str(directory / "job" / "run.yaml").encode(), []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
            if wanted in words and b"train" in words:
                pairs = (process / "environ").read_bytes().decode(errors="replace").split("\0")
                found.append(dict(pair.split("=", 1) for pair in pairs if "=" in pair))
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return sorted(found, key=lambda e: int(e["RANK"]))
