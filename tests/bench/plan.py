"""Predicted beside measured memory of real runs on two ranks: `python -m bench.plan [CASE]...`.

The teacher is a copy on each rank, split over both, or files; corrected is what `dskd plan --measure` then says. The
models have 56 to 112 M weights. Measured is what `dskd plan --measure` measures: the most memory of a rank above
that of the process before it reads anything. libc is told to hand back at once whatever is freed, so that it is tensors
that are counted, as torch counts them on a GPU. Models are saved in the type that the run does not train in, so that no
weight stays mapped to its file.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path

from support.tiny import Tiny, write_records

from dskd.cli import ENVIRONMENT
from dskd.config.load import load_run
from dskd.config.run import RunConfig
from dskd.launch.ranks import free_port, rank_environment
from dskd.plan.forecast import Forecast
from dskd.plan.machine import this_machine
from dskd.plan.measured import Measured, correct
from dskd.plan.models import read_models

RANKS, LENGTH = 2, 192
LLAMA = {"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 32000, "max_position_embeddings": 256}
MODELS = {
    # 56 M, 112 M and 72 M weights
    "llama": LLAMA | {"hidden_size": 512, "num_hidden_layers": 8, "intermediate_size": 1408},
    "mistral": LLAMA | {"hidden_size": 768, "num_hidden_layers": 10, "intermediate_size": 2048},
    "gpt2": {"n_embd": 640, "n_layer": 8, "n_head": 10, "vocab_size": 50257, "n_positions": 256},
}
CASES = {
    "ZeRO-0 fp32 kd": ("llama", "mistral", ("method.kind=kd", "engine.zero_stage=0", "engine.precision=fp32")),
    "ZeRO-0 bf16 dskd_cma, cache": (
        *("gpt2", "mistral"),
        ("method.kind=dskd_cma", "engine.zero_stage=0", "teacher.backend=cache"),
    ),
    "ZeRO-2 fp32 dskd, sharded": (
        *("llama", "mistral"),
        ("method.kind=dskd", "engine.zero_stage=2", "engine.precision=fp32", "teacher.backend=sharded"),
    ),
    "ZeRO-2 bf16 kd, two micro-batches": (
        *("llama", "mistral"),
        ("method.kind=kd", "engine.zero_stage=2", "train.micro_batch_size=2"),
    ),
    "ZeRO-3 fp32 uld, sharded": (
        *("gpt2", "mistral"),
        ("method.kind=uld", "engine.zero_stage=3", "engine.precision=fp32", "teacher.backend=sharded"),
    ),
    "ZeRO-3 bf16 kd, checkpointing, cache": (
        *("llama", "mistral"),
        ("method.kind=kd", "engine.zero_stage=3", "engine.gradient_checkpointing=true", "teacher.backend=cache"),
    ),
}


def make_run(root: Path, case: str) -> RunConfig:
    """Records longer than max_length, but for some, so that there is padding."""
    student, teacher, overrides = CASES[case]
    precision = "fp32" if "engine.precision=fp32" in overrides else "bf16"
    folders = [saved_model(root, family, "bf16" if precision == "fp32" else "fp32") for family in (student, teacher)]
    text = "The old dog of Lima sleeps by the sea. "
    lengths = [(5, 20) if index % 4 == 3 else (20, 60) for index in range(32)]
    records = [{"prompt": text * prompt, "output": text * output} for prompt, output in lengths]
    data = write_records(root / "records.jsonl", records)
    (root / "run.yaml").write_text(
        f"""
student: {{path: {folders[0]}}}
teacher: {{path: {folders[1]}}}
data: {{train: {data}, dev: {data}, workers: 0, max_length: {LENGTH}, max_prompt_length: 64}}
method: {{kind: kd}}
train: {{global_batch_size: 8, micro_batch_size: 4}}
output: {{root: {root / "outputs"}}}
"""
    )
    return load_run(root / "run.yaml", overrides)


def saved_model(root: Path, family: str, precision: str) -> Path:
    """A model of random weights with a real tokenizer, saved in a type."""
    import torch
    from transformers import AutoModelForCausalLM

    folder = root / f"{family}-{precision}"
    if not folder.is_dir():
        made = Tiny(root)(family, **MODELS[family])
        if precision == "fp32":
            return made
        model = AutoModelForCausalLM.from_pretrained(made, dtype=torch.bfloat16)
        model.save_pretrained(folder)
        for file in made.glob("tokenizer*"):
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


def run_cases(cases: Iterable[str] = tuple(CASES)) -> dict[str, dict[str, float]]:
    """Predicted and measured bytes of some runs, predicted from the characters of their records."""
    results = {}
    with tempfile.TemporaryDirectory() as root:
        for case in cases:
            run = make_run(Path(root), case)
            assert run.teacher is not None
            if run.teacher.backend == "cache":
                make_cache(Path(root), case)
            forecast = Forecast(run, read_models(run), this_machine(RANKS), run.teacher.backend)
            measured = Measured(**json.loads(in_ranks("bench.plan", "--rank", case, root)))
            _, correction = correct(forecast, measured)
            totals = [each.memory.total for each in (forecast, replace(forecast, correction=correction))]
            ratio, corrected = (total / measured.peak for total in totals)
            results[case] = {
                "predicted_bytes": totals[0],
                "measured_bytes": measured.peak,
                "ratio": ratio,
                "corrected_ratio": corrected,
            }
            both = f"{totals[0] / 1e9:.3f} GB, {measured.peak / 1e9:.3f} GB measured"
            print(f"{case}: {both}, {ratio:.3f}, corrected {corrected:.3f}", flush=True)
    return results


def make_cache(root: Path, case: str) -> None:
    command = [sys.executable, "-m", "dskd", "teacher", "cache", str(root / "run.yaml"), *CASES[case][2]]
    subprocess.run([*command, "launch.processes=1"], check=True, stdout=subprocess.DEVNULL)


def in_ranks(*arguments: str) -> str:
    """What the first of two ranks prints last."""
    hand_back = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_MMAP_MAX_": "10000000", "OMP_NUM_THREADS": "1"}
    base, port = ENVIRONMENT | os.environ | hand_back | {"PYTHONPATH": str(Path(__file__).parents[1])}, free_port()
    command = [sys.executable, "-m", *arguments]
    ranks = [
        subprocess.Popen(command, env=base | rank_environment(rank, RANKS, port), stdout=subprocess.PIPE, text=True)
        for rank in range(RANKS)
    ]
    outputs = [process.communicate()[0] for process in ranks]
    return outputs[0].splitlines()[-1]


def rank(case: str, root: str) -> None:
    from dskd.engine import distributed
    from dskd.measure import measure

    found = measure(load_run(Path(root) / "run.yaml", CASES[case][2]), distributed.start())
    distributed.stop()
    print(json.dumps(asdict(found)))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        rank(*sys.argv[2:])
    else:
        run_cases(sys.argv[1:] or CASES)
