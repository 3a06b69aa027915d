"""Memory that a teacher takes of each of four ranks, sharded against resident: `python -m bench.teacher_sharded`.

The teacher is a Qwen2 of random weights, 1.1 GB in bf16, of as many layers as the 72B one has, and with a head that is
as large a part of it. A small student under ZeRO-3 trains in the same processes, a step after each of its. All
memory of a process counts above what it had before the teacher, at its peak, and so do pages mapped from the teacher's
files: a resident teacher on a CPU consists of them.

`python -m bench.teacher_sharded MODEL BACKEND STUDENT.yaml` is one of the ranks.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from support.tiny import Tiny, byte_level_tokenizer, tiny_config, write_run
from transformers import AutoModelForCausalLM

from bench.measure import one_thread, peak_bytes
from dskd.assemble import Training, assemble
from dskd.config.load import load_run
from dskd.config.models import TeacherConfig
from dskd.data.batch import Batch, collate
from dskd.data.tokenization import Sample
from dskd.engine import distributed
from dskd.launch.ranks import free_port, rank_environment
from dskd.models.load import load_tokenizer
from dskd.teachers.backends import load_teacher
from dskd.train import train_step

RANKS = 4
SHAPE = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 80}
SHAPE |= {"num_attention_heads": 12, "num_key_value_heads": 12}
VOCABULARY = 12288
STEPS, MICRO_BATCHES, SAMPLES, PROMPT, RESPONSE = 2, 2, 2, 24, 40


def make_batches(rank: int) -> list[Batch]:
    rng = np.random.default_rng(rank)
    found = []
    for _ in range(MICRO_BATCHES):
        samples = [Sample(rng.integers(0, 300, PROMPT), rng.integers(0, 300, RESPONSE)) for _ in range(SAMPLES)]
        side = collate(samples)
        found.append(Batch((), side, side))
    return found


def as_rank(model: Path, backend: str, run: Path) -> dict[str, float]:
    """Bytes at the peak of loading and of running, above those of the student alone."""
    one_thread()
    ranks = distributed.start()
    tokenizer, batches = load_tokenizer(model, "teacher.path"), make_batches(ranks.rank)
    student = assemble(load_run(run), ranks)
    train_student(student, 1)
    before = resident_bytes()
    teacher = load_teacher(student.run, TeacherConfig(model, backend=backend), tokenizer, ranks)
    loading = peak_bytes() - before
    resident_bytes()
    for step in range(STEPS):
        list(teacher.states(batches))
        train_student(student, step + 2)
    running = peak_bytes() - before
    distributed.stop()
    return {"loading_bytes": loading, "running_bytes": running}


def train_student(training: Training, step: int) -> None:
    indices = training.plan.micro_batches(step - 1, training.ranks.rank, training.ranks.world_size)
    train_step(training, step, [training.train(own) for own in indices])


def resident_bytes() -> int:
    """What is in use now; the next peak is counted from here."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes()


def largest(model: Path, backend: str, run: Path) -> dict[str, float]:
    """The figures of the rank with the highest, of ranks in processes of their own."""
    port, command = free_port(), [sys.executable, "-m", "bench.teacher_sharded", str(model), backend, str(run)]
    ranks = [
        subprocess.Popen(command, env=os.environ | rank_environment(rank, RANKS, port), stdout=subprocess.PIPE)
        for rank in range(RANKS)
    ]
    outputs = [rank.communicate()[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * RANKS
    figures = [json.loads(output.splitlines()[-1]) for output in outputs]
    return {name: max(each[name] for each in figures) for name in figures[0]}


def make_model(folder: Path) -> Path:
    words = byte_level_tokenizer()
    config = tiny_config("qwen2", words, tied=False, vocab_size=VOCABULARY, **SHAPE)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder, max_shard_size="10GB")
    words.save_pretrained(folder)
    return folder


def main() -> None:
    with tempfile.TemporaryDirectory() as root:
        model, folder = make_model(Path(root) / "teacher"), Path(root)
        train, engine = {"global_batch_size": 8 * RANKS, "micro_batch_size": 8}, {"precision": "bf16", "zero_stage": 3}
        run = write_run(Tiny(folder), folder, method={"kind": "sft"}, train=train, engine=engine)
        resident, sharded = (largest(model, backend, run) for backend in ("resident", "sharded"))
    found = {f"resident_{name}": value for name, value in resident.items()}
    found |= {f"sharded_{name}": value for name, value in sharded.items()}
    print(json.dumps(found | {"share": max(sharded.values()) / max(resident.values())}))


if __name__ == "__main__":
    if len(sys.argv) == 4:
        print(json.dumps(as_rank(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))))
    else:
        main()
