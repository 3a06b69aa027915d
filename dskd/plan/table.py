"""What a run will need, on one screen."""

import sys
from collections.abc import Iterator
from dataclasses import replace

from rich.console import Console
from rich.table import Table

from dskd.config.hub import model_name
from dskd.plan.advice import Verdict, gigabytes, hours_told, nodes_told, state, told
from dskd.plan.forecast import Forecast
from dskd.plan.memory import activations

WIDTH = 100
UNITS = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"))
PARTS = ("weights", "gradients", "optimizer", "activations", "teacher", "loss", "other")


def show_plan(found: Verdict) -> None:
    """Print what a run needs with each backend, and what to do."""
    console = Console(width=None if sys.stdout.isatty() else WIDTH, markup=False, highlight=False)
    for line in heading(found.asked):
        console.print(line)
    console.print(table(found))
    for line in notes(found):
        console.print(line)


def heading(asked: Forecast) -> Iterator[str]:
    run, workload = asked.run, asked.models.workload
    taught = run.teacher is not None and asked.models.teacher is not None
    teacher = f"{model_name(run.teacher.path)} -> " if run.teacher is not None and taught else ""
    how = f"{run.method.kind}, {run.engine.precision}, ZeRO-{run.engine.zero_stage}"
    steps = f"{workload.steps} steps of {run.train.global_batch_size} records ({workload.epochs:g} epochs)"
    yield f"{teacher}{model_name(run.student.path)}, {how}; {steps}"
    source = "4 characters a token" if workload.known else "no file: as long as may be"
    yield (
        f"{workload.records} records ({source}): {millions(workload.padded_tokens)} padded tokens an epoch, "
        f"{millions(workload.response_tokens)} of responses"
    )
    yield asked.machine.name


def millions(number: int) -> str:
    return f"{number / 1e6:.2f} M"


def table(found: Verdict) -> Table:
    unit = "GPU" if found.asked.machine.on_gpu else "rank"
    made = Table(box=None, pad_edge=False, header_style="bold")
    made.add_column("teacher")
    short = ("weights", "grads", "optim.", "activ.", "teacher", "loss", "other")
    for name in (*short, f"GB a {unit}", "host", "disk", "time", "nodes"):
        made.add_column(name, justify="right")
    for forecast in found.forecasts:
        made.add_row(*row(forecast, forecast is found.asked))
    return made


def row(forecast: Forecast, asked: bool) -> list[str]:
    parts = forecast.memory
    nodes = forecast.nodes_needed
    return [
        f"{name_of(forecast)}{'*' if asked else ''}",
        *(gigabytes(getattr(parts, name)) for name in PARTS),
        gigabytes(parts.total),
        gigabytes(forecast.host) if forecast.host else "-",
        gigabytes(forecast.disk),
        hours_told(forecast.hours),
        "none" if nodes is None else str(nodes),
    ]


def name_of(forecast: Forecast) -> str:
    return forecast.backend if forecast.models.teacher is not None else "none"


def flops_told(flops: float) -> str:
    """Floating point operations, in the largest unit of which there is at least one."""
    unit, name = next(((unit, name) for unit, name in UNITS if flops >= unit), UNITS[-1])
    return f"{flops / unit:.1f} {name}FLOP"


def notes(found: Verdict) -> Iterator[str]:
    asked = found.asked
    machine = asked.machine
    where = f"launch.nodes={machine.nodes}" if machine.on_gpu else "this machine alone"
    yield f"* as the run asks, on {where}; host, disk: GB; nodes: the fewest on which it fits so"
    work = ", ".join(f"{flops_told(forecast.flops)} {name_of(forecast)}" for forecast in found.forecasts)
    yield f"work of all ranks together: {work}"
    engine = asked.run.engine
    without, with_ = (
        gigabytes(activations(replace(asked.step, engine=replace(engine, gradient_checkpointing=checkpointing))))
        for checkpointing in (False, True)
    )
    yield f"activations: {without} GB, and {with_} GB with engine.gradient_checkpointing=true"
    for forecast in found.forecasts:
        if forecast.making:
            size, making = gigabytes(forecast.cache_bytes), gigabytes(forecast.making)
            yield f"the cache: {size} GB; made once, in {making} GB a rank with the teacher split over {machine.ranks}"
    copies = gigabytes(asked.copies)
    yield f"saving: from copies in {copies} GB of a node's memory, where twice as much is free; else training waits"
    yield state(found)
    if found.advice is None:
        yield f"best: none was found that fits, on up to {nodes_told(machine.most_nodes)}"
    elif found.advice.changes:
        yield f"best: {' '.join(found.advice.changes)}"
        yield f"      {told(found.advice.forecast)}"
    else:
        yield "best: as it is"
