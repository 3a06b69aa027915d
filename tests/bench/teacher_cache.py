"""Five epochs from a teacher's cache, its making included, against a resident teacher: `python -m bench.teacher_cache`.

The teacher and tokenizer of the quick start, dskd_cma, fp32: SmolLM2-135M, and a student of 5.7 M parameters. The first
records of a file that is named, else made ones in the lengths of Dolly. CPU seconds of one thread, data included; the
share of a step that waits for data is measured with one worker process, as in a run. Beside the ratio stands the one
that `dskd plan` foretells of the same run; and how far states in bf16 differ, whose batches have other padding.
"""

import json
import os
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

import torch
from support.tiny import write_records
from transformers import LlamaConfig, LlamaForCausalLM

from bench.measure import one_thread
from bench.training_step import DOLLY
from dskd.assemble import Training, assemble
from dskd.config.load import load_run, override
from dskd.config.run import RunConfig
from dskd.data.loader import Steps, load_steps
from dskd.data.shard import Shard
from dskd.engine import distributed
from dskd.engine.distributed import Ranks
from dskd.launch.ranks import free_port, rank_environment
from dskd.plan.forecast import Forecast
from dskd.plan.machine import this_machine
from dskd.plan.models import read_models
from dskd.quickstart import write_teacher, write_tokenizer
from dskd.teachers.cache.write import write_cache
from dskd.train import train_step

EPOCHS, RECORDS, BATCH = 5, 16, 8


def made_records(count: int) -> list[dict[str, object]]:
    """About a token a word."""
    words = " the river runs by a small town where they sell old books"
    texts = [(words * 30).split(" ")[1:] for _ in range(count)]
    lengths = [DOLLY[index % len(DOLLY)] for index in range(count)]
    return [
        {"prompt": f"{i} {' '.join(text[:prompt])}", "output": " ".join(text[:response])}
        for i, (text, (prompt, response)) in enumerate(zip(texts, lengths, strict=True))
    ]


def write_student(folder: Path) -> None:
    """A small new Llama with the tokenizer of Mistral 7B."""
    write_tokenizer(folder)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=160,
        intermediate_size=448,
        num_hidden_layers=2,
        num_attention_heads=5,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def make_run(root: Path, file: str | None) -> RunConfig:
    for name, write in (("teacher", write_teacher), ("student", write_student)):
        (root / name).mkdir()
        write(root / name)
    data = root / "records.jsonl"
    if file is None:
        write_records(data, made_records(RECORDS))
    else:
        with Path(file).open() as lines:
            data.write_text("".join(islice(lines, RECORDS)))
    (root / "run.yaml").write_text(
        f"""
student: {{path: {root}/student}}
teacher: {{path: {root}/teacher}}
data: {{train: {data}, dev: {data}}}
method: {{kind: dskd_cma}}
train: {{epochs: {EPOCHS}, global_batch_size: {BATCH}, micro_batch_size: 4}}
engine: {{precision: fp32}}
output: {{root: {root}/outputs}}
"""
    )
    return load_run(root / "run.yaml")


def timed(training: Training, workers: int, steps: int) -> tuple[float, float]:
    """CPU seconds of some steps in this process, and the share of their time that waits for data."""
    batches = load_steps(Steps(training.plan, training.train, 0, 1), 0, steps, workers, pin_memory=False)
    waits, begun, used = [], time.monotonic(), time.process_time()
    for step in range(1, steps + 1):
        asked = time.monotonic()
        micro_batches = next(batches)
        waits.append(time.monotonic() - asked)
        train_step(training, step, micro_batches)
    # The first wait is for the worker's start, once in a run.
    return time.process_time() - used, sum(waits[1:]) / (time.monotonic() - begun - waits[0])


def predicted_ratio(run: RunConfig) -> float:
    """How many times as long `dskd plan` says that a resident teacher takes."""
    models, machine = read_models(run), this_machine(1)
    resident, cache = (Forecast(run, models, machine, backend).hours for backend in ("resident", "cache"))
    return resident / cache


def in_bf16(run: RunConfig, ranks: Ranks) -> dict[str, float]:
    """States of the first epoch from a cache, against those of the resident teacher, and the losses of two steps."""
    run = override(run, ["engine.precision=bf16"])
    write_cache(run, Shard(), ranks)
    resident, cached = (assemble(override(run, [f"teacher.backend={b}"]), ranks) for b in ("resident", "cache"))
    equal, errors = [], []
    for step in range(RECORDS // BATCH):
        for batch in Steps(cached.plan, cached.train, 0, 1)[step]:
            (exact,) = resident.teacher.states([batch])
            equal.append((batch.states == exact).all(-1))
            errors.append((batch.states - exact).float().norm(dim=-1) / exact.float().norm(dim=-1))
    losses = [
        [train_step(each, step, Steps(each.plan, each.train, 0, 1)[step - 1])["loss"] for step in (1, 2)]
        for each in (resident, cached)
    ]
    return {
        "bf16_equal_share": float(torch.cat(equal).float().mean()),
        "bf16_mean_difference": float(torch.cat(errors).mean()),
        "bf16_largest_difference": float(torch.cat(errors).max()),
        "bf16_loss_difference": max(abs(own - whole) / whole for whole, own in zip(*losses, strict=True)),
    }


def measure(run: RunConfig, ranks: Ranks) -> dict[str, float]:
    steps = EPOCHS * (RECORDS // BATCH)
    resident, _ = timed(assemble(run, ranks), 0, steps)
    used = time.process_time()
    write_cache(run, Shard(), ranks)
    making = time.process_time() - used
    training = assemble(override(run, ["teacher.backend=cache"]), ranks)
    cached, _ = timed(training, 0, steps)
    _, waiting = timed(training, 1, steps)
    return {
        "epochs": EPOCHS,
        "resident_seconds": resident,
        "making_seconds": making,
        "cached_seconds": cached,
        "resident_over_cache": resident / (making + cached),
        "predicted_ratio": predicted_ratio(run),
        "waiting_share": waiting,
        **in_bf16(run, ranks),
    }


def main(files: list[str]) -> None:
    one_thread()
    os.environ |= rank_environment(0, 1, free_port())
    with tempfile.TemporaryDirectory() as root:
        found = measure(make_run(Path(root), files[0] if files else None), distributed.start())
    distributed.stop()
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
