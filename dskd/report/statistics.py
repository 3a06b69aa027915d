"""Means, deviations and the paired bootstrap."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from statistics import fmean, stdev

RESAMPLES = 1000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Summary:
    """Scores over training seeds and sampling seeds."""

    mean: float
    deviation: float | None
    """Sample deviation over all of them; None where there is one alone."""
    training: float | None
    """That of the means of the runs; None for one run."""
    sampling: float | None
    """That over the sampling seeds of a run, root mean square over the runs; None for one seed."""


def summarize(scores: Mapping[tuple[int, int], float]) -> Summary | None:
    """`scores` by (run, sampling seed); None where there are none."""
    if not scores:
        return None
    by_run: dict[int, list[float]] = {}
    for (run, _), score in scores.items():
        by_run.setdefault(run, []).append(score)
    variances = [stdev(values) ** 2 for values in by_run.values() if len(values) > 1]
    return Summary(
        mean=fmean(fmean(values) for values in by_run.values()),
        deviation=deviation(list(scores.values())),
        training=deviation([fmean(values) for values in by_run.values()]),
        sampling=math.sqrt(fmean(variances)) if variances else None,
    )


def deviation(values: Sequence[float]) -> float | None:
    return stdev(values) if len(values) > 1 else None


def average(sets: Sequence[Mapping[tuple[int, int], float]]) -> dict[tuple[int, int], float]:
    """Mean over sets for each (run, sampling seed) that all of them have; empty where one of them lacks any."""
    if not sets or any(each.keys() != sets[0].keys() for each in sets):
        return {}
    return {key: fmean(each[key] for each in sets) for key in sets[0]}


@dataclass(frozen=True)
class Comparison:
    """A group beside its baseline, on the records of one set."""

    difference: float
    low: float
    high: float

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0


def paired_bootstrap(differences: Sequence[float]) -> Comparison:
    """Mean difference over the records with its percentile interval; the records are drawn anew, with repetition."""
    random, count = Random(0), len(differences)
    means = sorted(sum(random.choices(differences, k=count)) / count for _ in range(RESAMPLES))
    cut = round(RESAMPLES * (1 - CONFIDENCE) / 2)
    return Comparison(fmean(differences), means[cut], means[-1 - cut])
