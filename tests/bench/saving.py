"""What saving the state costs: seconds of one save as a share of 50 steps, in a small model, in this process."""

import statistics
import time
from pathlib import Path
from typing import Any

from dskd.config.run import RunConfig
from dskd.data.loader import Steps
from dskd.engine import state
from dskd.engine.delivery import Delivery
from dskd.engine.distributed import Ranks
from dskd.train import prepare, train_step

INTERVAL = 50


def measure(run: RunConfig, ranks: Ranks, steps: int = 6, saves: int = 3) -> dict[str, Any]:
    """Seconds of a step and of a save (medians, each after one that does not count), and the share at 50 steps."""
    job = prepare(run, ranks)
    batches = Steps(job.plan, job.train, ranks.rank, ranks.world_size)
    took: list[float] = []
    for step in range(1, steps + 2):
        begun = time.monotonic()
        train_step(job, step, batches[step - 1])
        took.append(time.monotonic() - begun)
    saved: list[float] = []
    delivery = Delivery(None, run.directory, ranks.rank)
    for step in range(steps + 2, steps + saves + 3):
        begun = time.monotonic()
        folder, progress = run.directory / state.FOLDER / f"step{step}", state.Progress(step)
        written = state.write(folder, delivery, job.engine, ranks)
        if ranks.is_main:
            state.complete(folder, progress, written, keep_last=1)
        ranks.barrier()
        saved.append(time.monotonic() - begun)
    step_seconds, save_seconds = statistics.median(took[1:]), statistics.median(saved[1:])
    return {
        "step_seconds": step_seconds,
        "save_seconds": save_seconds,
        "state_bytes": size_of(run.directory / state.FOLDER),
        "share_at_50_steps": save_seconds / (save_seconds + INTERVAL * step_seconds),
    }


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
