"""How long training stands still for a state and a model, saved in three ways in turns: `python -m bench.saving`.

A gpt2 of 170 M weights, whose state takes 2 GB and whose model 0.7 GB, on one thread and the temporary folder's disk.
The plain form is safetensors' own writer, synced, and read again for the sum, of the state alone. Training waits where
there is no memory for copies, and stands still for the copying where there is.
"""

import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from safetensors.torch import save_file
from support.tiny import Tiny, write_records
from torch import Tensor

from bench.measure import one_thread
from dskd.assemble import Training, assemble
from dskd.checkpoint.host_memory import Copies
from dskd.checkpoint.manager import CheckpointManager
from dskd.checkpoint.shards import pieces_file
from dskd.config.load import load_run
from dskd.config.run import RunConfig
from dskd.data.loader import Steps
from dskd.engine import distributed
from dskd.engine.distributed import Ranks
from dskd.launch.ranks import free_port, rank_environment
from dskd.rundir.files import entry, sync_file
from dskd.rundir.layout import ModelName
from dskd.rundir.train_state import SavedModel, Scores, TrainState
from dskd.train import train_step

MONITOR: Any = SimpleNamespace(position=lambda: 0)


def measure(run: RunConfig, ranks: Ranks, turns: int = 3) -> dict[str, Any]:
    """Medians of some turns, after one that does not count."""
    training = assemble(run, ranks)
    batches = Steps(training.plan, training.train, ranks.rank, ranks.world_size)
    manager = CheckpointManager(run, ranks, training.engine, training.length)
    memory, found, step, alone = manager.copies, [], 0, []

    def make_step() -> float:
        nonlocal step
        step += 1
        begun = time.monotonic()
        train_step(training, step, batches[step - 1])
        return time.monotonic() - begun

    for _ in range(turns + 1):
        alone.append(make_step())
        plain = plain_save(training, run.directory / "plain.safetensors")
        manager.copies = Copies(None, None, "")
        waiting, _ = save(training, manager, step)
        settle(manager, step)
        make_step()
        manager.copies = memory
        standing, done = save(training, manager, step)
        during = []
        while not done:
            during.append(make_step())
        writing = done[0]
        settle(manager, step)
        found.append((plain, waiting, standing, writing, statistics.median(during), len(during)))
    manager.close()
    plain, waiting, standing, writing, during, steps = map(statistics.median, zip(*found[1:], strict=True))
    return {
        "state_bytes": size_of(run.directory / "resume"),
        "model_bytes": size_of(run.directory) - size_of(run.directory / "resume"),
        "plain_seconds": plain,
        "waiting_seconds": waiting,
        "standing_seconds": standing,
        "writing_seconds": writing,
        "standing_share": standing / writing,
        "waiting_over_standing": waiting / standing,
        "step_seconds": statistics.median(alone[1:]),
        "step_seconds_while_writing": during,
        "steps_while_writing": steps,
    }


def plain_save(training: Training, file: Path) -> float:
    """Seconds of the plain form, of the state alone."""
    file.parent.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    content = pieces_file(training.engine, Tensor.detach, {}, {})
    save_file(dict(content.tensors), file, dict(content.metadata or {}))
    sync_file(file)
    entry(file)
    took = time.monotonic() - begun
    file.unlink()
    return took


def save(training: Training, manager: CheckpointManager, step: int) -> tuple[float, list[float]]:
    """Save a model and the state; seconds until training may go on, and, once all is on the disk, those until then."""
    begun, done = time.monotonic(), list[float]()
    name = ModelName(1, step, 9.0)
    manager.keep_model(
        manager.directory.model(name), training.distiller.student, training.distiller.method, training.dev.student
    )
    manager.save(TrainState(step, best=(SavedModel(str(name), Scores(9.0, 0.0)),)))
    standing = time.monotonic() - begun
    # The thread does one thing after the other: what is submitted now is done after all of it.
    manager.staging.submit(lambda: done.append(time.monotonic() - begun))
    return standing, done


def settle(manager: CheckpointManager, step: int) -> None:
    """Until the state is published, and the one before is gone."""
    while manager.on_the_way:
        manager.arrive(TrainState(step), wait=True)


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors") if not file.parent.is_symlink())


def make_run(root: Path) -> RunConfig:
    """Short records: the less a step takes, the more saving is of it."""
    tiny = Tiny(root)
    student = tiny("gpt2", n_embd=1024, n_head=16, n_layer=12, n_positions=32, vocab_size=20000)
    data = write_records(root / "records.jsonl", [{"prompt": "The old dog", "output": " sleeps."}] * 64)
    (root / "run.yaml").write_text(
        f"""
student: {{path: {student}}}
data: {{train: {data}, dev: {data}, max_length: 16, max_prompt_length: 8, workers: 0}}
method: {{kind: sft}}
train: {{epochs: 100, global_batch_size: 1, micro_batch_size: 1}}
engine: {{precision: fp32}}
output: {{root: {root / "outputs"}}}
"""
    )
    return load_run(root / "run.yaml")


def main() -> None:
    one_thread()
    os.environ |= rank_environment(0, 1, free_port())
    with tempfile.TemporaryDirectory() as root:
        found = measure(make_run(Path(root)), distributed.start())
    distributed.stop()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
