"""Whole training steps on a GPU: `steps` of bench.gpu.

A random student in the shape of Qwen2.5-1.5B and a teacher in that of the 3B one take dskd's own steps under DeepSpeed
(ZeRO-1): with micro-batches of records and of tokens, with decoder layers as they are written and compiled. Records are
as long as `max_length`, or in the lengths of Dolly.

MFU is the share of the chip's arithmetic that goes into products with weights and into attention, over tokens that are
no padding: forward and backward of the student, forward of the teacher, and what the loss needs of both heads.
"""

import gc
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from bench.loss_heads import DUAL_SPACE, PRODUCTS
from bench.training_step import DOLLY
from dskd.assemble import Distiller, Training
from dskd.config.data import DataConfig
from dskd.config.engine import EngineConfig
from dskd.config.methods import MethodConfig
from dskd.config.models import StudentConfig, TeacherConfig
from dskd.config.run import OutputConfig, RunConfig, accumulation_steps
from dskd.config.training import TrainConfig
from dskd.data.batch import Batch, collate
from dskd.data.budget import Budget
from dskd.data.tokenization import Sample
from dskd.engine.distributed import Ranks
from dskd.engine.zero import build_engine, deepspeed_config
from dskd.losses import METHODS
from dskd.losses.tensors import MethodContext
from dskd.models import compilation
from dskd.models.views import ModelView, try_packing
from dskd.rundir.read import RunLength
from dskd.teachers.resident import ResidentTeacher
from dskd.train import padding, train_step

KINDS = ("sft", "kd", "dskd")
STUDENT = {"hidden_size": 1536, "num_hidden_layers": 28, "num_attention_heads": 12, "intermediate_size": 8960}
TEACHER = {"hidden_size": 2048, "num_hidden_layers": 36, "num_attention_heads": 16, "intermediate_size": 11008}
VOCABULARY, KEY_VALUE_HEADS = 151936, 2
RECORDS = {"full": [(129, 382)] * 16, "Dolly": DOLLY * 5}  # tokens of prompt and response
MICRO_BATCH, TOKENS, LONGEST = 8, 8192, 512
WARM_UP, STEPS = 2, 5
PEAKS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}
"""Dense bf16 operations a second, by what a device's name holds."""


@dataclass(frozen=True)
class Sizes:
    student: dict[str, int]
    teacher: dict[str, int]
    vocabulary: int
    records: dict[str, list[tuple[int, int]]]


REAL = Sizes(STUDENT, TEACHER, VOCABULARY, RECORDS)
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
TINY = Sizes(SMALL, SMALL | {"hidden_size": 32}, 128, {name: [(2, 3), (3, n)] * 8 for n, name in enumerate(RECORDS, 2)})


def run_of(kind: str, records: int, root: Path, device: torch.device) -> RunConfig:
    precision = "bf16" if device.type == "cuda" else "fp32"
    return RunConfig(
        StudentConfig(root / "student"),
        DataConfig(root / "none", root / "none"),
        MethodConfig.kinds[kind](),
        TeacherConfig(root / "teacher"),
        TrainConfig(global_batch_size=records, micro_batch_size=MICRO_BATCH, lr=1e-6, projector_lr=1e-6),
        engine=EngineConfig(zero_stage=1 if precision == "bf16" else 0, precision=precision),
        output=OutputConfig(root / "outputs"),
    )


def model(shape: dict[str, int], sizes: Sizes, run: RunConfig, device: torch.device) -> Any:
    fields = {"num_key_value_heads": KEY_VALUE_HEADS, "vocab_size": sizes.vocabulary, "tie_word_embeddings": True}
    dtype = torch.bfloat16 if run.engine.precision == "bf16" else torch.float32
    with device:
        return AutoModelForCausalLM.from_config(Qwen2Config(**shape, **fields), dtype=dtype)


def put_together(run: RunConfig, sizes: Sizes, ranks: Ranks) -> Training:
    """A run without records or tokenizers, as `assemble` would give it."""
    student, teacher, device = model(sizes.student, sizes, run, ranks.device), None, ranks.device
    view = ModelView(student, "student.path")
    if run.method.teacher != "none":
        made = model(sizes.teacher, sizes, run, device).eval().requires_grad_(False)
        teacher = ResidentTeacher(ModelView(made, "teacher.path"))
    context = MethodContext(view.ends, None if teacher is None else teacher.ends, run.engine.loss_memory_mb)
    method = METHODS[run.method.kind](run.method, context)
    config = deepspeed_config(run, 1, accumulation_steps(run, 1))
    engine = build_engine(Distiller(student, view.body, method, context), method, run, config)
    engine.train()
    nothing: Any = None
    return Training(run, ranks, engine, view.ends, teacher, nothing, RunLength(1000, 1000), nothing, nothing)


def views_of(training: Training) -> list[ModelView]:
    student = ModelView(training.distiller.student, "student.path")
    return [student, training.teacher.view] if isinstance(training.teacher, ResidentTeacher) else [student]


def micro_batches(
    records: list[tuple[int, int]], vocabulary: int, by_tokens: bool = False, packed: bool = True
) -> list[Batch]:
    """Records of like length together, as a run would cut them: so many, or up to so many tokens."""
    rng, ordered = np.random.default_rng(0), sorted(records, key=sum)
    samples = [Sample(*(rng.integers(0, vocabulary, length) for length in record)) for record in ordered]
    parts = [range(start, start + MICRO_BATCH) for start in range(0, len(samples), MICRO_BATCH)]
    if by_tokens:
        parts = Budget(TOKENS, lambda index: (sum(ordered[index]),) * 2, packed).cut(range(len(samples)), 1)
    sides = [
        collate([samples[index] for index in part if index < len(samples)], packed=by_tokens and packed)
        for part in parts
    ]
    return [Batch((), side, side) for side in sides]


def forward_operations(view: ModelView, lengths: list[int]) -> float:
    """Of a body: two for each weight and token, and of causal attention."""
    config, embeddings = view.causal.config, view.ends.embeddings.weight
    weights = sum(p.numel() for p in view.body.module.parameters() if p is not embeddings)
    attention = 2 * config.num_hidden_layers * config.hidden_size * sum(n * n for n in lengths)
    return 2 * weights * sum(lengths) + attention


def operations(kind: str, views: list[ModelView], records: list[tuple[int, int]]) -> float:
    """All that a step has to compute."""
    lengths = [sum(record) for record in records]
    total = 3 * forward_operations(views[0], lengths) + sum(forward_operations(view, lengths) for view in views[1:])
    responses = sum(response for _, response in records)
    for side, view in zip(("student", "teacher"), views, strict=False):
        products = sum(PRODUCTS.get(kind, DUAL_SPACE).get(side, ()))
        total += products * 2 * responses * view.ends.vocab_size * view.ends.hidden_size
    return total


def peak_of(device: torch.device) -> float | None:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def measure(training: Training, batches: list[Batch], wanted: float) -> dict[str, float | None]:
    """Seconds of a step (the median), and what part of the chip's arithmetic that is."""
    device, took = training.ranks.device, []
    begun = time.perf_counter()
    for step in range(1, WARM_UP + STEPS + 1):
        if step == WARM_UP + 1 and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        start = time.perf_counter()
        train_step(training, step, batches)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        took.append(time.perf_counter() - start)
    seconds, peak = median(took[WARM_UP:]), peak_of(device)
    tokens = sum(int(batch.student.attention_mask.sum()) for batch in batches)
    empty, places = padding(batches)
    return {
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "mfu": None if peak is None else wanted / seconds / peak,
        "tflops": wanted / seconds / 1e12,
        "padding": empty / places,
        "micro_batches": len(batches),
        "peak_gib": torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None,
        "first_step_seconds": took[0],
        "all_seconds": time.perf_counter() - begun,
    }


def steps(tiny: bool, ranks: Ranks, root: Path, until: float) -> dict[str, object]:
    """Each kind with each form; what does not begin before `until` is left out."""
    sizes, found = TINY if tiny else REAL, {}
    most = max(len(records) for records in sizes.records.values())
    no_compiler = compilation.problem(ranks.device)
    for kind in KINDS:
        training = put_together(run_of(kind, most // MICRO_BATCH * MICRO_BATCH, root, ranks.device), sizes, ranks)
        views = views_of(training)
        packed = not any(try_packing(view, LONGEST) for view in views)
        for compiled in (False, True):
            if compiled and no_compiler is None:
                for view in views:
                    compilation.compile_layers(view)
            for (name, records), by_tokens in product(sizes.records.items(), (False, True)):
                cut = f"{TOKENS} tokens" if by_tokens else f"{MICRO_BATCH} records"
                case = f"{kind}, {name}, {cut}, {'compiled' if compiled else 'as written'}"
                batches = micro_batches(records, sizes.vocabulary, by_tokens, packed)
                if compiled and no_compiler is not None:
                    found[case] = {"why": no_compiler}
                elif time.monotonic() > until:
                    found[case] = {"why": "no time is left"}
                else:
                    found[case] = measured_where_it_fits(training, batches, operations(kind, views, records))
                print(case, found[case], flush=True)
        del training, views
        gc.collect()
        if ranks.device.type == "cuda":
            torch.cuda.empty_cache()
    return found


def measured_where_it_fits(training: Training, batches: list[Batch], wanted: float) -> dict[str, object]:
    try:
        return measure(training, batches, wanted)
    except torch.OutOfMemoryError:
        return {"why": "out of memory"}
