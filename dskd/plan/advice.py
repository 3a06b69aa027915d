"""Of all ways in which a run fits on a machine, the one to take: fewest nodes, then least time, then fewest changes."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from dskd.config.models import TeacherBackend
from dskd.config.run import RunConfig
from dskd.config.training import TrainConfig
from dskd.plan.forecast import BACKENDS, UNMEASURED, Correction, Forecast
from dskd.plan.machine import GB, Machine
from dskd.plan.models import Models

STAGES: tuple[Literal[0, 1, 2, 3], ...] = (0, 1, 2, 3)
WORTH = 0.02
"""Share of the time that a changed setting has to save."""


@dataclass(frozen=True)
class Advice:
    """What would happen with some settings changed."""

    forecast: Forecast
    changes: tuple[str, ...]
    """KEY=VALUE, as on the command line."""

    @property
    def cost(self) -> float:
        return self.forecast.hours * (1 + WORTH * len(self.changes))


@dataclass(frozen=True)
class Verdict:
    """A run as it is, with each backend, and what to do."""

    asked: Forecast
    forecasts: tuple[Forecast, ...]
    """One for each backend; without a teacher one alone."""
    advice: Advice | None
    """None where nothing was found that fits."""


def judge(run: RunConfig, machine: Machine, models: Models, correction: Correction = UNMEASURED) -> Verdict:
    """Forecasts of a run on a machine, and the advice."""
    asked = run.teacher.backend if run.teacher is not None else "resident"
    backends = BACKENDS if models.teacher is not None else (asked,)
    made = {backend: Forecast(run, models, machine, backend, correction) for backend in backends}
    return Verdict(made[asked], tuple(made.values()), advise(made[asked], backends))


def advise(asked: Forecast, backends: tuple[TeacherBackend, ...]) -> Advice | None:
    """The best on as many nodes as asked for; where nothing fits there, on the fewest on which anything does."""
    for forecast in (asked, *asked.on_each_number_of_nodes()):
        fitting = [advice for advice in variants(forecast, asked, backends) if advice.forecast.fits]
        if fitting:
            return min(fitting, key=lambda advice: advice.cost)
    return None


def variants(base: Forecast, asked: Forecast, backends: tuple[TeacherBackend, ...]) -> Iterator[Advice]:
    """The run with settings changed that take memory from it and leave its result what it is."""
    engine = base.run.engine
    stages = [stage for stage in STAGES if stage >= engine.zero_stage]
    trains = list(smaller_micro_batches(base.run))
    for backend in backends:
        for stage in stages:
            for checkpointing in {engine.gradient_checkpointing, True}:
                for train in trains:
                    changed = replace(
                        base.run,
                        train=train,
                        engine=replace(engine, zero_stage=stage, gradient_checkpointing=checkpointing),
                    )
                    forecast = replace(base, run=changed, backend=backend)
                    yield Advice(forecast, changes_between(asked, forecast))


def smaller_micro_batches(run: RunConfig) -> Iterator[TrainConfig]:
    """The run's settings, and with micro-batches halved as often as that goes."""
    train, tokens, size = run.train, run.train.micro_batch_tokens, run.train.micro_batch_size
    if tokens is None:
        yield from (replace(train, micro_batch_size=size >> n) for n in range(size.bit_length()))
    else:
        halves = range((tokens // run.data.max_length).bit_length())
        yield from (replace(train, micro_batch_tokens=tokens >> n) for n in halves)


def changes_between(asked: Forecast, other: Forecast) -> tuple[str, ...]:
    """KEY=VALUE of what `other` has otherwise."""
    found = {
        "teacher.backend": (asked.backend, other.backend),
        "launch.nodes": (asked.machine.nodes, other.machine.nodes),
        "engine.zero_stage": (asked.run.engine.zero_stage, other.run.engine.zero_stage),
        "engine.gradient_checkpointing": (
            asked.run.engine.gradient_checkpointing,
            other.run.engine.gradient_checkpointing,
        ),
        "train.micro_batch_size": (asked.run.train.micro_batch_size, other.run.train.micro_batch_size),
        "train.micro_batch_tokens": (asked.run.train.micro_batch_tokens, other.run.train.micro_batch_tokens),
    }
    return tuple(f"{key}={str(new).lower()}" for key, (old, new) in found.items() if new != old)


def verdict_line(found: Verdict) -> str:
    """What is found, in one line."""
    if found.asked.fits:
        return state(found)
    if found.advice is None:
        return f"{state(found)}; nothing that fits was found on up to {nodes_told(found.asked.machine.most_nodes)}"
    return f"{state(found)}; {' '.join(found.advice.changes)} would: {told(found.advice.forecast)}"


def state(found: Verdict) -> str:
    """Whether the run as it is fits, and what it needs."""
    asked = found.asked
    said = f"{'fits' if asked.fits else 'does not fit'}: {told(asked)}"
    if asked.divides:
        return said
    size, ranks = asked.run.train.global_batch_size, asked.machine.ranks
    return f"{said}, and train.global_batch_size={size} does not divide over {ranks} ranks"


def told(forecast: Forecast) -> str:
    """Memory and time of a forecast."""
    machine = forecast.machine
    unit = "GPU" if machine.on_gpu else "process"
    needed = max(forecast.memory.total, forecast.making)
    teacher = f" with the {forecast.backend} teacher" if forecast.models.teacher is not None else ""
    memory = f"{gigabytes(needed)} of {gigabytes(machine.memory)} GB a {unit}{teacher}"
    return f"{memory}; {hours_told(forecast.hours)} on {nodes_told(machine.nodes)}"


def nodes_told(nodes: int) -> str:
    return f"{nodes} node{'s' if nodes > 1 else ''}"


def gigabytes(number: int) -> str:
    """Bytes as GB, with as many digits as tell something."""
    digits = 0 if number >= 100 * GB else 1 if number >= GB else 2
    return f"{number / GB:.{digits}f}"


def hours_told(hours: float) -> str:
    if hours < 1:
        return f"{max(1, round(60 * hours))} min"
    return f"{hours:.1f} h" if hours < 10 else f"{hours:.0f} h"
