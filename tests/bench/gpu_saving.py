"""How long training stands still while a state and a model are saved on a GPU: `saving` of bench.gpu."""

import shutil
import time
from pathlib import Path

from support.tiny import byte_level_tokenizer

from bench.gpu_steps import REAL, TINY, micro_batches, put_together, run_of
from dskd.checkpoint.manager import CheckpointManager
from dskd.engine.distributed import Ranks
from dskd.rundir.layout import ModelName, RunDirectory
from dskd.rundir.train_state import TrainState
from dskd.train import train_step

BYTES_A_WEIGHT = 16
"""Of a state and a model, with room to spare."""


def saving(tiny: bool, ranks: Ranks, root: Path) -> dict[str, object]:
    """Seconds that training stands still, then those until all is written, and a step alone and beside the writing."""
    sizes = TINY if tiny else REAL
    records = sizes.records["full"]
    run = run_of("sft", len(records), root, ranks.device)
    training = put_together(run, sizes, ranks)
    weights = sum(p.numel() for p in training.distiller.student.parameters())
    free = shutil.disk_usage(root).free
    if free < BYTES_A_WEIGHT * weights:
        return {"why": f"{free / 1e9:.0f} GB are free in {root}, of {BYTES_A_WEIGHT * weights / 1e9:.0f} wanted"}
    batches = micro_batches(records, sizes.vocabulary)
    for step in range(1, 4):  # the first makes the optimizer's state
        start = time.perf_counter()
        train_step(training, step, batches)
        alone = time.perf_counter() - start
    manager = CheckpointManager(run, ranks, training.engine, training.length)
    own = RunDirectory.of(run)
    own.path.mkdir(parents=True)
    start = time.perf_counter()
    manager.save(TrainState(3))
    state = time.perf_counter() - start
    manager.keep_model(
        own.model(ModelName(1, 3, 1.0, None)),
        training.distiller.student,
        training.distiller.method,
        byte_level_tokenizer(),
    )
    both = time.perf_counter() - start
    beside = time.perf_counter()
    train_step(training, 4, batches)
    beside = time.perf_counter() - beside
    while manager.on_the_way:
        manager.arrive(TrainState(4), wait=True)
    written = time.perf_counter() - start
    manager.close()
    bytes_written = sum(file.stat().st_size for file in own.path.rglob("*") if file.is_file())
    print("saving", both, "of", written, flush=True)
    return {
        "stands_still_seconds": both,
        "for_the_state_seconds": state,
        "written_seconds": written,
        "bytes": bytes_written,
        "copies": manager.copies.told,
        "step_seconds": alone,
        "step_beside_seconds": beside,
    }
