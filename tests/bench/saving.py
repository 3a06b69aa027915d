"""What saving the state costs: seconds of one save as a share of 50 steps: `python -m bench.saving`.

A dskd_cma run of the models of `bench.training_step`, global batch 4: the fewer tokens a step has, the more it is.
"""

import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from support.tiny import Tiny, write_records

from bench.measure import one_thread
from dskd.assemble import assemble
from dskd.checkpoint import state
from dskd.checkpoint.retention import retain
from dskd.checkpoint.staging import Staging
from dskd.config.load import load_run
from dskd.config.run import RunConfig
from dskd.data.loader import Steps
from dskd.engine import distributed
from dskd.engine.distributed import Ranks
from dskd.launch.ranks import free_port, rank_environment
from dskd.rundir.layout import RunDirectory
from dskd.rundir.train_state import TrainState
from dskd.train import train_step

INTERVAL = 50


def measure(run: RunConfig, ranks: Ranks, steps: int = 6, saves: int = 3) -> dict[str, Any]:
    """Seconds of a step and of a save (medians, each after one that does not count), and the share at 50 steps."""
    training = assemble(run, ranks)
    batches = Steps(training.plan, training.train, ranks.rank, ranks.world_size)
    took: list[float] = []
    for step in range(1, steps + 2):
        begun = time.monotonic()
        train_step(training, step, batches[step - 1])
        took.append(time.monotonic() - begun)
    saved: list[float] = []
    directory = RunDirectory.of(run)
    staging = Staging(None, directory.path, ranks.rank)
    for step in range(steps + 2, steps + saves + 3):
        begun = time.monotonic()
        now = TrainState(step)
        written = state.write(directory.state(now.name), staging, training.engine, ranks)
        if ranks.is_main:
            state.complete(directory, now, written)
            retain(directory, now, keep_last=1)
        ranks.barrier()
        saved.append(time.monotonic() - begun)
    step_seconds, save_seconds = statistics.median(took[1:]), statistics.median(saved[1:])
    return {
        "step_seconds": step_seconds,
        "save_seconds": save_seconds,
        "state_bytes": size_of(directory.states),
        "share_at_50_steps": save_seconds / (save_seconds + INTERVAL * step_seconds),
    }


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


def make_run(root: Path) -> RunConfig:
    """Records as long as max_length; random weights in the shape and with the vocabularies of real models."""
    tiny = Tiny(root)
    student = tiny("gpt2", n_embd=256, n_layer=4, n_positions=512, vocab_size=50257)
    shape = {"hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 8}
    teacher = tiny("qwen2", **shape, intermediate_size=1408, max_position_embeddings=512, vocab_size=151936)
    text = "The old dog of Lima sleeps by the sea. "
    data = write_records(root / "records.jsonl", [{"prompt": text * 30, "output": text * 20}] * 64)
    (root / "run.yaml").write_text(
        f"""
student: {{path: {student}}}
teacher: {{path: {teacher}}}
data: {{train: {data}, dev: {data}, workers: 0}}
method: {{kind: dskd_cma}}
train: {{global_batch_size: 4, micro_batch_size: 4}}
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
