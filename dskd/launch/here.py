"""The stages of a pipeline run on this machine, without Slurm."""

import os
import re
import sys
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO

from dskd.config.stopping import UNFINISHED
from dskd.launch.pipeline import Stage
from dskd.launch.ranks import Supervisor, exit_code, show_tail
from dskd.launch.request import Request
from dskd.rundir.jobs import Jobs


def run_here(stages: Sequence[Stage]) -> int:
    """Run the stages one after the other; the exit code. Of a stage `parallel` jobs run at a time, else one.

    After a failure, what does not depend on it still runs. A job that wants to be run again ends all: so does this.
    """
    failed: set[str] = set()
    for stage in stages:
        missing = failed.intersection(stage.needs)
        if missing:
            print(f"{stage.name}: skipped, {', '.join(sorted(missing))} failed", file=sys.stderr)
            failed.add(stage.name)
            continue
        codes = run_jobs(stage.name, stage.open, stage.parallel or 1)
        if UNFINISHED in codes:
            return UNFINISHED
        if any(codes):
            failed.add(stage.name)
        else:
            print(f"{stage.name}: complete", flush=True)
    return 1 if failed else 0


def run_jobs(name: str, requests: Sequence[Request], parallel: int) -> list[int]:
    """Run jobs, at most `parallel` at a time, and one for each GPU, or processor where there is none; their exit codes.

    One alone writes to this terminal. What of several each writes is kept, and its end shown where that one fails. A
    signal is passed on to those that run, no other begins, and the last code is `UNFINISHED`.
    """
    gpus, waiting, codes = visible_gpus(), deque(requests), []
    shares = min(parallel, len(gpus) or os.cpu_count() or 1, len(requests))
    running: dict[int, tuple[Request, IO[bytes] | None, int]] = {}  # by their place among the supervisor's children
    with ExitStack() as stack:
        supervisor = stack.enter_context(Supervisor())
        while running or (waiting and not supervisor.received):
            if waiting and len(running) < shares and not supervisor.received:
                request = waiting.popleft()
                share = min(set(range(shares)) - {taken for _, _, taken in running.values()})
                output: IO[bytes] | None = stack.enter_context(tempfile.TemporaryFile()) if shares > 1 else None
                begin(name, request)
                supervisor.start(request.command, os.environ | share_of(gpus, share, shares), output)
                running[len(supervisor.ranks) - 1] = request, output, share
                continue
            for child in [each for each in running if supervisor.ranks[each].poll() is not None]:
                request, output, _ = running.pop(child)
                codes.append(exit_code(supervisor.ranks[child].returncode))
                if codes[-1]:
                    show_tail(f"{request.directory} failed", output)
            time.sleep(0.05)
        return codes + ([UNFINISHED] if supervisor.received else [])


def begin(name: str, request: Request) -> None:
    if request.settings is not None:
        jobs = Jobs.at(request.directory)
        jobs.write_file(jobs.folder.settings, request.settings)
    print(f"{name}: {request.directory}", flush=True)


def visible_gpus() -> list[str]:
    """As CUDA_VISIBLE_DEVICES names them, or all of this machine's."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [each for each in named.split(",") if each.strip()]
    devices = (re.fullmatch(r"nvidia(\d+)", device.name) for device in Path("/dev").glob("nvidia*"))
    return sorted((found[1] for found in devices if found), key=int)


def share_of(gpus: Sequence[str], share: int, shares: int) -> dict[str, str]:
    """What one of `shares` jobs at a time has to itself: variables over those of this process."""
    if shares == 1:
        return {}
    if gpus:
        return {"CUDA_VISIBLE_DEVICES": ",".join(gpus[share::shares])}
    return {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str((os.cpu_count() or 1) // shares)}
