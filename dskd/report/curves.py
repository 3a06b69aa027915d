"""Figures of metrics.jsonl as charts: those that are known in their order, and whatever else is there after them."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from dskd.config.errors import one_line
from dskd.report.document import Chart, Figures, Line
from dskd.report.runs import Group, Run

NOT_SHOWN = {"step", "epoch", "seconds", "tokens"}
MOST_POINTS = 60_000
"""Of all curves together, about 14 bytes each."""
FEWEST, MOST = 12, 200
"""Points of one curve."""


@dataclass(frozen=True)
class Figure:
    title: str
    log: bool = False


KNOWN = {
    "loss": Figure("loss"),
    "ce": Figure("ce: cross-entropy of the response"),
    "kd": Figure("kd: distance to the teacher"),
    "t2s_ce": Figure("t2s_ce: cross-entropy of the projected teacher"),
    "t2s_kd": Figure("t2s_kd: distance in the student's space"),
    "s2t_kd": Figure("s2t_kd: distance in the teacher's space"),
    "dev_loss": Figure("dev loss"),
    "dev_accuracy": Figure("dev accuracy: share of tokens"),
    "dev_rougel": Figure("dev ROUGE-L"),
    "dev_exact_match": Figure("dev exact match"),
    "accuracy": Figure("accuracy: the student agrees with the label"),
    "t2s_accuracy": Figure("t2s_accuracy: the projected teacher agrees"),
    "s2t_accuracy": Figure("s2t_accuracy: the projected student agrees"),
    "aligned_tokens": Figure("aligned_tokens: share of response tokens"),
    "samples_without_alignment": Figure("samples_without_alignment: share"),
    "padding": Figure("padding: share of the student's places"),
    "tokens_per_second": Figure("response tokens a second"),
    "gpu_gib": Figure("memory of the main rank's GPU, peak so far, GiB"),
    "grad_norm": Figure("norm of the gradient", log=True),
    "lr": Figure("learning rate"),
    "projector_lr": Figure("learning rate of the projectors"),
}


def curve_figures(groups: Sequence[Group]) -> Iterator[Figures]:
    """All charts, with one legend."""
    runs = [run for group in groups for run in group.runs]
    found = dict.fromkeys(name for run in runs for line in (*run.steps, *run.evaluations) for name in line)
    names = [
        name for name in (*KNOWN, *(n for n in found if n not in KNOWN)) if name in found and name not in NOT_SHOWN
    ]
    most = min(MOST, max(FEWEST, MOST_POINTS // max(1, len(names) * len(runs))))
    charts = [chart for name in names if (chart := chart_of(name, groups, most)).lines]
    if charts:
        yield Figures(charts, [(group.label, style) for style, group in enumerate(groups)])


def chart_of(name: str, groups: Sequence[Group], most: int) -> Chart:
    figure = KNOWN.get(name) or Figure(one_line(name, 60))
    lines = [
        Line(f"{group.label}, seed {run.config.train.seed}", style, thinned(points, most), restarts_within(run, points))
        for style, group in enumerate(groups)
        for run in group.runs
        if (points := points_of(name, run))
    ]
    return Chart(figure.title, lines, figure.log, dots=name.startswith("dev_"))


def points_of(name: str, run: Run) -> list[tuple[float, float]]:
    lines: Sequence[Mapping[str, Any]] = [*run.steps, *run.evaluations]
    return [(float(line["step"]), float(line[name])) for line in lines if is_finite(line, "step", name)]


def is_finite(line: Mapping[str, Any], *names: str) -> bool:
    values = [line.get(name) for name in names]
    return all(isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) for v in values)


def restarts_within(run: Run, points: Sequence[tuple[float, float]]) -> list[float]:
    return [float(step) for step in run.restarts if points[0][0] <= step <= points[-1][0]]


def thinned(points: Sequence[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """At most so many points: means over neighbours, the first and the last as they are."""
    if len(points) <= most:
        return list(points)
    inner, count = points[1:-1], most - 2
    cuts = [len(inner) * i // count for i in range(count + 1)]
    parts = [inner[a:b] for a, b in pairwise(cuts) if a < b]
    means = [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]
    return [points[0], *means, points[-1]]
