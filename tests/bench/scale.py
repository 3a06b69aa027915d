"""What grows with records, and with ranks: `python -m bench.scale`.

A file of a million short records: CPU seconds of a rank from its start to the end of a run of one step, its memory, and
what it takes to see that all of them are in a teacher's cache. And how often four ranks of a machine read a model from
its disk that all of them load, as a share of the model's files: what one has read, the others find in memory.

`python -m bench.scale train RUN.yaml`, `... find RUN.yaml` and `... load FOLDER` are single measurements.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from support.tiny import Tiny, varied_records, write_records

from bench.measure import in_own_process, one_thread, peak_bytes
from bench.plan import saved_model
from dskd.config.load import load_run
from dskd.config.models import StudentConfig, TeacherConfig
from dskd.config.run import RunConfig
from dskd.data.records import read_records
from dskd.data.shard import Shard
from dskd.data.tokenization import Limits, tokenize
from dskd.engine import distributed
from dskd.engine.zero import deepspeed_config, partitioned_loading
from dskd.launch.ranks import free_port, rank_environment
from dskd.models.load import load_student, load_tokenizer
from dskd.teachers.backends import load_teacher
from dskd.teachers.cache.folder import CacheFolder
from dskd.teachers.cache.pieces import open_piece, record_key, text_key, write_piece
from dskd.teachers.cache.precision import Stored
from dskd.teachers.cache.read import LOOKED_AT, StoredStates, check_complete, made_with
from dskd.train import train

RECORDS, RANKS = 1_000_000, 4
PLACES = ("resident", "sharded", "student")
"""A model for each way to load one: pages that a process has mapped stay in memory."""


def make_run(root: Path) -> Path:
    tiny, data, dev = Tiny(root), root / "train.jsonl", root / "dev.jsonl"
    write_records(dev, varied_records(4))
    text = " The old dog of Lima sleeps by the sea, and the bird does not."
    with data.open("w") as lines:
        for index in range(RECORDS):
            lines.write(json.dumps({"prompt": f"{index}:{text}", "output": text * (1 + index % 3)}) + "\n")
    run = {
        "student": {"path": str(tiny("gpt2"))},
        "teacher": {"path": str(tiny("qwen2"))},
        "data": {"train": str(data), "dev": str(dev), "max_length": 64, "max_prompt_length": 32, "workers": 0},
        "method": {"kind": "kd"},
        "train": {"max_steps": 1, "global_batch_size": 8, "micro_batch_size": 8},
        "engine": {"precision": "fp32"},
        "output": {"root": str(root / "outputs")},
    }
    (root / "run.yaml").write_text(json.dumps(run))
    return root / "run.yaml"


def one_step(run: RunConfig) -> dict[str, float]:
    train(run, distributed.start())
    distributed.stop()
    return {"first_step_seconds": time.process_time(), "first_step_bytes": peak_bytes()}


def find_all(run: RunConfig) -> dict[str, float]:
    """Pieces without rows, since none is read."""
    assert run.teacher is not None
    limits = Limits(run.data.max_length, run.data.max_prompt_length)
    records, tokenizer = read_records(run.data.train), load_tokenizer(run.teacher.path, "teacher.path")
    folder = CacheFolder(run.cache_folder)
    folder.path.mkdir(parents=True)
    started = time.process_time()
    keys = [record_key(tokenize(tokenizer, record, limits)) for record in records[:LOOKED_AT]]
    tokenizing = (time.process_time() - started) / LOOKED_AT
    keys += [index.to_bytes(32) for index in range(LOOKED_AT, RECORDS)]
    texts = [text_key(record) for record in records]
    nothing = Stored(torch.empty((0, 32)))
    piece = open_piece(write_piece(folder, Shard(), keys, [nothing] * RECORDS, made_with(tokenizer, limits), texts))
    ranks, started = distributed.start(), time.process_time()
    check_complete(StoredStates(folder, [piece], torch.float32), records, tokenizer, limits, ranks)
    found = {"finding_seconds": time.process_time() - started, "tokenizing_seconds": tokenizing * RECORDS}
    distributed.stop()
    return found | {"finding_bytes": peak_bytes()}


def load_all(root: Path) -> dict[str, float]:
    """As one of the ranks."""
    ranks, run = distributed.start(), load_run(root / "run.yaml")
    tokenizer, found = load_tokenizer(root / "resident", "teacher.path"), {}

    def load_partitioned() -> object:
        with partitioned_loading(deepspeed_config(run, RANKS, 1)):
            return load_student(StudentConfig(root / "student"), "fp32", False)

    def teacher(backend: str) -> object:
        settings = TeacherConfig(root / backend, backend=backend)  # type: ignore[arg-type]
        return load_teacher(run, settings, tokenizer, ranks)

    ways: dict[str, Callable[[], object]] = {place: lambda place=place: teacher(place) for place in PLACES[:2]}
    for place, load in (ways | {"student": load_partitioned}).items():
        (file,) = (root / place).glob("*.safetensors")
        ranks.barrier()
        forget(file)
        ranks.barrier()
        before, loaded = read_from_disk(), load()
        if place == "resident":
            [float(weight.sum()) for weight in loaded.view.causal.parameters()]  # a page is read when it is touched
        found[f"{place}_reads"] = ranks.sum_int(read_from_disk() - before) / file.stat().st_size
    distributed.stop()
    return found


def forget(file: Path) -> None:
    """Let the system drop what it holds of a file in memory."""
    with file.open("rb") as data:
        os.fsync(data.fileno())
        os.posix_fadvise(data.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_from_disk() -> int:
    """Bytes that this process has let the system fetch from storage."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["read_bytes"])


def of_a_node(root: Path) -> dict[str, float]:
    model = saved_model(root, "mistral", "bf16")
    for place in PLACES:
        shutil.copytree(model, root / place)
    port, command = free_port(), [sys.executable, "-m", "bench.scale", "load", str(root)]
    ranks = [
        subprocess.Popen(command, env=os.environ | rank_environment(rank, RANKS, port), stdout=subprocess.PIPE)
        for rank in range(RANKS)
    ]
    outputs = [rank.communicate()[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * RANKS
    found: dict[str, float] = json.loads(outputs[0].splitlines()[-1])
    return found


def main(arguments: list[str]) -> dict[str, float]:
    if arguments[:1] == ["load"]:
        return load_all(Path(arguments[1]))
    if arguments:
        os.environ |= rank_environment(0, 1, free_port())
        return {"train": one_step, "find": find_all}[arguments[0]](load_run(Path(arguments[1])))
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR", "/var/tmp")) as root:
        file = make_run(Path(root))
        own = [in_own_process("scale", what, str(file)) for what in ("train", "find")]
        (Path(root) / "train.jsonl").write_bytes((Path(root) / "dev.jsonl").read_bytes())
        return own[0] | own[1] | of_a_node(Path(root)) | {"records": RECORDS, "ranks": RANKS}


if __name__ == "__main__":
    one_thread()
    print(json.dumps(main(sys.argv[1:])))
