"""CPU seconds and extra peak memory of one piece of work, in a process of its own, on one thread."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from dskd.cli import ENVIRONMENT


def peak_bytes() -> int:
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def measured(work: Callable[[], object]) -> dict[str, float]:
    """Seconds, and bytes at the peak above those in use before."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before, start = peak_bytes(), time.process_time()
    work()
    return {"seconds": time.process_time() - start, "extra_bytes": peak_bytes() - before}


def seconds(work: Callable[[], object], repeats: int = 3) -> float:
    """The median of some repeats."""
    found = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        found.append(time.process_time() - start)
    return median(found)


def in_own_process(module: str, *arguments: str) -> dict[str, float]:
    """What `python -m bench.MODULE ARGUMENTS` prints last, as JSON."""
    command = [sys.executable, "-m", f"bench.{module}", *arguments]
    environment = ENVIRONMENT | os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
