"""`make bench`: loss heads, training steps, alignments and more, against their dense or plain forms, on one thread.

Prints tables and writes bench.json. `python -m bench [--quick] [RECORDS STUDENT_TOKENIZER TEACHER_TOKENIZER]`: with
files, the steps run on these records; --quick leaves out the dense forms, which take most of the time.
"""

import json
import platform
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.measure import in_own_process
from bench.plan import run_cases
from bench.scale import PLACES
from dskd.losses import METHODS

GIB = 2**30
ALIGNED = (64, 128, 256, 512, 1024, 2048)


def loss_heads(quick: bool) -> dict[str, dict[str, float]]:
    found = {}
    for kind in METHODS:
        case = in_own_process("loss_heads", kind, "streamed")
        case["over_floor"] = case["seconds"] / case["floor_seconds"]
        if not quick:
            dense = in_own_process("loss_heads", kind, "dense")
            case |= {f"dense_{name}": value for name, value in dense.items()}
            case["dense_over_streamed"] = dense["seconds"] / case["seconds"]
        found[kind] = case
        show(f"{kind}: {case['seconds']:.1f} s, {case['over_floor']:.2f} x floor")
    return found


def training_step(files: list[str], quick: bool) -> dict[str, float]:
    found = in_own_process("training_step", "streamed", *files)
    if not quick:
        dense = in_own_process("training_step", "dense", *files)
        found |= {"dense_seconds": dense["seconds"], "dense_extra_bytes": dense["extra_bytes"]}
        found["dense_over_streamed"] = dense["seconds"] / found["seconds"]
    return found


def alignments() -> dict[str, dict[str, float]]:
    found = {}
    for tokens in ALIGNED:
        case = in_own_process("alignments", str(tokens))
        for name in ("minimum_edit", "exact"):
            case[f"{name}_speedup"] = case[f"{name}_plain"] / case[name]
        found[str(tokens)] = case
    return found


def tables(results: dict) -> list[Table]:
    heads = Table("loss head", "CPU s", "floor s", "x floor", "extra GiB", "dense CPU s", "dense extra GiB", "speed-up")
    for kind, case in results["loss_heads"].items():
        dense = (
            (
                f"{case['dense_seconds']:.1f}",
                f"{case['dense_extra_bytes'] / GIB:.1f}",
                f"{case['dense_over_streamed']:.1f}",
            )
            if "dense_seconds" in case
            else ("", "", "")
        )
        own = f"{case['seconds']:.1f}", f"{case['floor_seconds']:.1f}", f"{case['over_floor']:.2f}"
        heads.add_row(kind, *own, f"{case['extra_bytes'] / GIB:.2f}", *dense)
    step = Table("whole dskd_cma step", "CPU s", "dense CPU s", "speed-up")
    case = results["training_step"]
    dense = (
        (f"{case['dense_seconds']:.1f}", f"{case['dense_over_streamed']:.1f}") if "dense_seconds" in case else ("", "")
    )
    step.add_row(f"mean of {case['steps']}", f"{case['seconds']:.1f}", *dense)
    cut = Table("whole kd step, micro-batches of", "CPU s", "padding", "micro-batches", "most tokens")
    for form, case in results["micro_batches"].items():
        figures = f"{case['seconds']:.1f}", f"{100 * case['padding']:.0f} %", f"{case['micro_batches']:.1f}"
        cut.add_row(form, *figures, f"{case['largest']:.0f}")
    aligned = Table("alignment, tokens", "minimum edit ms", "plain ms", "speed-up", "exact ms", "plain ms", "speed-up")
    for tokens, case in results["alignments"].items():
        row = []
        for name in ("minimum_edit", "exact"):
            row += [f"{1e3 * case[name]:.2f}", f"{1e3 * case[f'{name}_plain']:.1f}", f"{case[f'{name}_speedup']:.0f}"]
        aligned.add_row(tokens, *row)
    saving = Table("saving", "plain s", "waiting s", "standing still s", "writing s", "share", "step s", "meanwhile s")
    case = results["saving"]
    names = "plain", "waiting", "standing", "writing", "step"
    row = [f"{case[f'{name}_seconds']:.2f}" for name in names]
    row.insert(4, f"{100 * case['standing_share']:.1f} %")
    sizes = f"state of {case['state_bytes'] / 1e9:.1f} GB, model of {case['model_bytes'] / 1e9:.1f}"
    saving.add_row(sizes, *row, f"{case['step_seconds_while_writing']:.2f}")
    cache = Table("teacher's cache", "resident s", "making s", "cached s", "speed-up", "predicted", "waiting for data")
    case = results["teacher_cache"]
    seconds = [f"{case[f'{name}_seconds']:.1f}" for name in ("resident", "making", "cached")]
    ratio, waiting = f"{case['resident_over_cache']:.2f}", f"{100 * case['waiting_share']:.2f} %"
    cache.add_row(f"dskd_cma, {case['epochs']} epochs", *seconds, ratio, f"{case['predicted_ratio']:.2f}", waiting)
    rounded = Table("in bf16, from a cache", "tokens equal", "mean difference", "largest", "of the loss")
    names = ("mean_difference", "largest_difference", "loss_difference")
    different = (f"{100 * case[f'bf16_{name}']:.3f} %" for name in names)
    rounded.add_row("hidden states", f"{100 * case['bf16_equal_share']:.0f} %", *different)
    answers = Table("answers batched by tokens", "CPU s", "fixed batches: CPU s", "speed-up")
    case = results["generation"]
    row = (f"{case[f'{name}_seconds']:.1f}" for name in ("by_tokens", "fixed"))
    answers.add_row(f"{case['records']} prompts", *row, f"{case['fixed_over_by_tokens']:.2f}")
    planned = Table("highest memory of a rank", "predicted GB", "measured GB", "predicted / measured", "corrected")
    for case, values in results["plan"].items():
        both = (f"{values[name] / 1e9:.2f}" for name in ("predicted_bytes", "measured_bytes"))
        planned.add_row(case, *both, f"{values['ratio']:.2f}", f"{values['corrected_ratio']:.2f}")
    teacher = Table("teacher on 4 ranks", "loading MiB a rank", "running MiB a rank", "share of resident")
    case = results["teacher_sharded"]
    for backend, share in (("resident", ""), ("sharded", f"{100 * case['share']:.1f} %")):
        sizes = (f"{case[f'{backend}_{phase}_bytes'] / 2**20:.0f}" for phase in ("loading", "running"))
        teacher.add_row(backend, *sizes, share)
    scale = Table("a million records, a rank", "CPU s", "GiB")
    case = results["scale"]
    for name, label in (("first_step", "a run of one step"), ("finding", "finding them in a teacher's cache")):
        scale.add_row(label, f"{case[f'{name}_seconds']:.0f}", f"{case[f'{name}_bytes'] / GIB:.2f}")
    reads = Table("read from disk by 4 ranks, of a model's files", *PLACES)
    reads.add_row("times", *(f"{case[f'{place}_reads']:.2f}" for place in PLACES))
    return [heads, step, cut, aligned, saving, cache, rounded, answers, planned, teacher, scale, reads]


def show(text: str | Table) -> None:
    Console(width=140).print(text)


def main(arguments: list[str]) -> None:
    quick = "--quick" in arguments
    files = [argument for argument in arguments if argument != "--quick"]
    results = {
        "machine": platform.processor() or platform.machine(),
        "loss_heads": loss_heads(quick),
        "training_step": training_step(files, quick),
        "micro_batches": in_own_process("micro_batches", *files[:2]),
        "alignments": alignments(),
        "saving": in_own_process("saving"),
        "teacher_cache": in_own_process("teacher_cache", *files[:1]),
        "generation": in_own_process("generation", *files[:2]),
        "plan": run_cases(),
        "teacher_sharded": in_own_process("teacher_sharded"),
        "scale": in_own_process("scale"),
    }
    Path("bench.json").write_text(json.dumps(results, indent=2) + "\n")
    for table in tables(results):
        show(table)


if __name__ == "__main__":
    main(sys.argv[1:])
