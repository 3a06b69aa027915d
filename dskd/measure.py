"""Three steps of a run on its longest records, and what they took: `dskd plan --measure`, in each of its ranks."""

import gc
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from dskd.assemble import Training, assemble
from dskd.config.run import RunConfig
from dskd.data.batch import Batch, longest_of
from dskd.engine.distributed import Ranks
from dskd.plan.measured import Measured
from dskd.train import train_step

STEPS = 3


def measure(run: RunConfig, ranks: Ranks) -> Measured:
    """Train for some steps and write nothing. A collective call."""
    gc.collect()
    bare = begin_counting(ranks.device)
    training = assemble(run, ranks)
    batches = longest_batches(training)
    for step in range(1, STEPS + 1):
        begun = time.monotonic()
        train_step(training, step, batches)
        seconds = time.monotonic() - begun
    sides = [batch.student for batch in batches]
    own = {
        "peak": peak_bytes(ranks.device) - bare,
        "longest": longest_of(sides),
        "padded": sum(side.input_ids.numel() for side in sides),
        "responses": sum(len(side.labels) for side in sides),
        "most": max(len(side.labels) for side in sides),
    }
    found = ranks.gather(own)
    on_gpu = ranks.device.type == "cuda"
    return Measured(
        peak=max(each["peak"] for each in found),
        seconds=seconds,
        longest=max(each["longest"] for each in found),
        padded_tokens=sum(each["padded"] for each in found),
        response_tokens=sum(each["responses"] for each in found),
        longest_responses=max(each["most"] for each in found),
        ranks=ranks.world_size,
        gpu_memory=torch.cuda.get_device_properties(ranks.device).total_memory if on_gpu else None,
    )


def longest_batches(training: Training) -> Sequence[Batch]:
    """This rank's micro-batches of the one global batch that holds the longest records."""
    plan, ranks = training.plan, training.ranks
    by_length = sorted(range(len(plan.sizes)), key=lambda index: plan.sizes[index])[-plan.global_batch_size :]
    return [training.train(own) for own in plan.micro_batches_of(by_length, ranks.rank, ranks.world_size)]


def begin_counting(device: torch.device) -> int:
    """Count the peak from here; bytes in use now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes(device)


def peak_bytes(device: torch.device) -> int:
    """The most that was in use: of tensors on a GPU, of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024
