"""One Slurm task: supervises its rank, and says how it ended."""

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from submitit import JobEnvironment

from dskd.config.stopping import STOP_SIGNALS, UNFINISHED
from dskd.launch.ranks import Supervisor
from dskd.rundir.jobs import Ending, Jobs, Meeting

MISTAKE = 2
ASKED = "asked to stop"
PATIENCE = 20.0
"""Seconds that the other ranks get to end by themselves, after one has failed."""


@dataclass(frozen=True)
class Task:
    """What submitit pickles: nothing that can go stale."""

    directory: Path
    command: tuple[str, ...]

    def __call__(self) -> None:
        sys.exit(run_task(self.directory, self.command))


def run_task(directory: Path, command: tuple[str, ...]) -> int:
    """Run the child to its end; the exit code for Slurm.

    0 stands for a rank that is finished as well as for one that wants to be started again, which is told by a file:
    any other code makes Slurm kill the other ranks, which may still be saving.
    """
    jobs, environment = Jobs.at(directory), JobEnvironment()
    rank, start = environment.global_rank, int(os.environ["DSKD_START"])
    log = jobs.folder.log(start, rank)
    log.parent.mkdir(parents=True, exist_ok=True)
    # submitit's own handlers act on rank 0 alone, and never let a rank save together with the others.
    with log.open("ab") as out, Supervisor() as supervisor:
        if jobs.is_cancelled():
            return 0
        supervisor.start(command, os.environ | rank_variables(environment, jobs.meeting()), out)
        code = supervisor.ranks[0].wait()
    if code == 0:
        return 0
    reason = again_reason(code, bool(supervisor.received))
    told = f"rank {rank} on {environment.hostname}: {reason or why_failed(code, log)}"
    jobs.mark_ending(Ending(reason is not None, ASKED if reason == ASKED else told))
    if code == UNFINISHED:
        return 0
    if code != MISTAKE:  # a mistake is noticed by all ranks at once
        time.sleep(PATIENCE)
    return code if code > 0 else 128 - code


def again_reason(code: int, asked: bool) -> str | None:
    """Why a run should be started again after a child ended with `code`; None where that would not help.

    A rank that a signal killed before it could handle it has nothing to save: it stopped as it was asked to.
    """
    ended_by = -code if code < 0 else code - 128 if code > 128 else 0
    if asked and (code == UNFINISHED or ended_by in STOP_SIGNALS):
        return ASKED
    if code == UNFINISHED:
        return "a rank died or stalled, or asked to be started again"
    if ended_by:
        return f"ended by signal {ended_by}"
    return None


def why_failed(code: int, log: Path) -> str:
    """Exit code and the last line that the child wrote."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    said = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return f"exit code {code}" + (f", {said[:300]}" if said else "")


def rank_variables(environment: JobEnvironment, meeting: Meeting) -> dict[str, str]:
    """What `dskd.engine.distributed` reads: places from Slurm's environment, and where this start's ranks meet."""
    local = environment.num_tasks // environment.num_nodes
    return {
        "RANK": str(environment.global_rank),
        "LOCAL_RANK": str(environment.local_rank),
        "WORLD_SIZE": str(environment.num_tasks),
        "LOCAL_WORLD_SIZE": str(local),
        # One node's ranks need no other interface than loopback.
        "MASTER_ADDR": environment.hostnames[0] if environment.num_nodes > 1 else "127.0.0.1",
        "MASTER_PORT": str(meeting.port),
        "DSKD_SECRET": meeting.secret,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or os.environ.get("SLURM_CPUS_PER_TASK", "1"),
    }
