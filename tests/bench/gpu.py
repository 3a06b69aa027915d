"""`make bench-gpu`: what runs on a GPU, against what cannot be saved; writes bench-gpu.json with the device's name.

    python -m bench.gpu [--device cpu] [--tiny] [--to FILE] [--disk FOLDER] [SECTION...]

It makes all that it needs at random in real sizes, without network, and takes about 8 minutes; what it has no time for
it leaves out. `--device cpu --tiny` shows that it works. The file is written after each section, so that nothing that
was measured is lost. Without DeepSpeed and what else dskd trains with, it measures the heads alone, and says so.

heads   forward and backward of loss heads over bf16 response tokens, in turns with the matrix products alone (the
        floor), with the default `loss_memory_mb` and with one that gives the fastest products; beside them the dense
        form, full logits of all tokens, through torch.compile.
steps   whole steps (`bench.gpu_steps`).
saving  how long training stands still while a state and a model are saved, to a file below --disk (`bench.gpu_saving`).
"""

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from support.heads import Weights

from bench.loss_heads import DUAL_SPACE, PRODUCTS, Sizes, dense_step, make, streamed_step
from dskd.config.engine import EngineConfig
from dskd.losses import kernels
from dskd.losses.method import Method
from dskd.losses.tensors import Tokens

QWEN, GPT2_QWEN = ((151936, 1536), (151936, 8192)), ((50257, 768), (151936, 2048))
LLAMA_QWEN = ((32000, 2048), (152064, 8192))
HEADS = {
    "sft": ("sft", *QWEN, 8192),
    "kd": ("kd", *QWEN, 8192),
    "dskd": ("dskd", *QWEN, 8192),
    "dskd_cma": ("dskd_cma", *GPT2_QWEN, 4096),
    "dskd_cma, wide": ("dskd_cma", *LLAMA_QWEN, 8192),
    "dskd_v2_eta": ("dskd_v2_eta", *GPT2_QWEN, 4096),
    "uld": ("uld", *GPT2_QWEN, 4096),
    "mined": ("mined", *GPT2_QWEN, 4096),
}
DENSE = ("sft", "kd", "dskd")  # what fits and compiles; the other methods' obvious forms go token by token
SAMPLE = 512
TINY = 64  # everything is so many times smaller
MEMORY_MB = (EngineConfig().loss_memory_mb, 1280)
REPEATS = 5
MINUTES = 6  # after which no step begins to be measured; saving comes last
GIB = 2**30


def smaller(size: tuple[int, int]) -> tuple[int, int]:
    return size[0] // TINY, size[1] // TINY


def timed(work: Callable[[], object]) -> float:
    """Milliseconds, once the device has nothing else to do."""
    synchronize = torch.cuda.synchronize if torch.get_default_device().type == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    work()
    synchronize()
    return 1e3 * (time.perf_counter() - start)


def extra_gib(work: Callable[[], object]) -> float | None:
    """Memory at the peak above that in use before; None where the device does not tell."""
    if torch.get_default_device().type != "cuda":
        return None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    return (torch.cuda.max_memory_allocated() - before) / GIB


def products(kind: str, student: Weights, teacher: Weights, own: Tokens, other: Tokens) -> Callable[[], object]:
    """The matrix products with the heads, and no more."""
    work: list[Callable[[], object]] = []
    for side, model, tokens in (("student", student, own), ("teacher", teacher, other)):
        counts = PRODUCTS.get(kind, DUAL_SPACE).get(side, (0, 0, 0))
        if not any(counts):
            continue
        weight, hidden = model.weight.detach(), tokens.hidden.detach()
        logits = torch.mm(hidden, weight.T)
        each = (
            partial(torch.mm, hidden, weight.T, out=logits),
            partial(torch.mm, logits, weight),
            partial(torch.mm, logits.T, hidden),
        )
        work += [product for count, product in zip(counts, each, strict=True) for _ in range(count)]
    return lambda: [product() for product in work]


def without_gradients(step: Callable[[], object], student: Weights, own: Tokens, method: Method) -> None:
    step()
    student.weight.grad = own.hidden.grad = None
    method.zero_grad()


def head(kind: str, sizes: Sizes, dtype: torch.dtype) -> dict[str, object]:
    """Our head at each memory and the floor, in turns; then the dense form."""
    found: dict[str, object] = {"sizes": asdict(sizes)}
    for memory_mb in MEMORY_MB:
        torch.manual_seed(0)
        method, student, teacher, own, other = make(kind, sizes, memory_mb, dtype)
        step = partial(without_gradients, partial(streamed_step, method, own, other), student, own, method)
        step()  # kernels are compiled
        extra = extra_gib(step)
        floor = products(kind, student, teacher, own, other)
        floor()
        floors, steps = zip(*[(timed(floor), timed(step)) for _ in range(REPEATS)], strict=True)
        times = {"ms": median(steps), "floor_ms": median(floors), "over_floor": median(steps) / median(floors)}
        found[f"loss_memory_mb={memory_mb}"] = times | {"extra_gib": extra}
        del floor
    if kind in DENSE:
        found["dense, compiled"] = dense(method, student, teacher, own, other)
    return found


def dense(method: Method, student: Weights, teacher: Weights, own: Tokens, other: Tokens) -> dict[str, object]:
    form = dense_step if torch.get_default_device().type == "cpu" else torch.compile(dense_step)
    step = partial(without_gradients, partial(form, method, student, teacher, own, other), student, own, method)
    try:
        step()
        return {"ms": median(timed(step) for _ in range(REPEATS)), "extra_gib": extra_gib(step)}
    except RuntimeError as error:  # out of memory, or nothing that compiles here
        return {"ms": None, "why": str(error).partition("\n")[0]}


def heads(given: argparse.Namespace) -> dict[str, object]:
    device = torch.device(given.device)
    with device:
        return {"kernels": kernels.problem(device) or "Triton", **dict(all_heads(given.tiny))}


def all_heads(tiny: bool) -> Iterator[tuple[str, object]]:
    dtype = torch.float32 if torch.get_default_device().type == "cpu" else torch.bfloat16
    for name, (kind, student, teacher, tokens) in HEADS.items():
        sizes = Sizes(student, teacher, (SAMPLE,) * (tokens // SAMPLE))
        if tiny:
            sizes = Sizes(smaller(student), smaller(teacher), (SAMPLE // TINY,) * 2)
        found = head(kind, sizes, dtype)
        print(name, json.dumps(found), flush=True)
        yield name, found
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def steps(given: argparse.Namespace) -> dict[str, object]:
    from bench import gpu_steps

    with one_rank(given) as (ranks, root):
        return gpu_steps.steps(given.tiny, ranks, root, given.until)


def saving(given: argparse.Namespace) -> dict[str, object]:
    from bench import gpu_saving

    with one_rank(given) as (ranks, root):
        return gpu_saving.saving(given.tiny, ranks, root)


@contextmanager
def one_rank(given: argparse.Namespace) -> Iterator[tuple[Any, Path]]:
    """This process as the only rank, and an empty folder."""
    from dskd.engine import distributed
    from dskd.launch.ranks import free_port, rank_environment

    device = torch.device(given.device, 0) if given.device == "cuda" else torch.device(given.device)
    if not torch.distributed.is_initialized():
        os.environ |= rank_environment(0, 1, free_port())
        distributed.start()
    with tempfile.TemporaryDirectory(dir=given.disk) as root:
        yield distributed.Ranks(0, 1, device), Path(root)


SECTIONS = {"heads": heads, "steps": steps, "saving": saving}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bench.gpu")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--to", type=Path, default=Path("bench-gpu.json"))
    parser.add_argument("--disk", type=Path, help="where states are saved and removed again; 25 GB")
    parser.add_argument("--minutes", type=float, default=MINUTES)
    parser.add_argument("section", nargs="*", choices=[*SECTIONS, []])
    given = parser.parse_args(arguments)
    on_gpu = given.device.startswith("cuda")
    if on_gpu and not torch.cuda.is_available():
        parser.error("no GPU here; --device cpu --tiny shows that this works")
    name = torch.cuda.get_device_name() if on_gpu else platform.processor() or platform.machine()
    found: dict[str, object] = {"device": name, "torch": torch.__version__, "tiny": given.tiny}
    given.until = time.monotonic() + 60 * given.minutes
    for section in given.section or SECTIONS:
        try:
            found[section] = SECTIONS[section](given)
        except ImportError as missing:
            found[section] = {"why": f"left out: {missing}"}
        print(f"{section} in {given.to}", flush=True)
        given.to.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
