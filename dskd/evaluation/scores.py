"""ROUGE-L and exact match of answers, and their mean and deviation over seeds."""

import statistics
import string
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer

SCORES = {"rougel": "ROUGE-L", "exact_match": "exact match"}
Summary = dict[str, dict[str, Any]]
"""Of each score its mean and deviation over the seeds, and its value for each."""


def score(answer: str, references: Sequence[str], scorer: "RougeScorer") -> tuple[float, float]:
    """ROUGE-L F-measure (stemmed) and exact match, best over the references, times 100."""
    rougel = max(scorer.score(reference, answer)["rougeL"].fmeasure for reference in references)
    exact = any(normalize(answer) == normalize(reference) for reference in references)
    return 100 * rougel, 100.0 * exact


def normalize(text: str) -> str:
    """Lower case, no punctuation, single spaces."""
    return " ".join(text.lower().translate(str.maketrans("", "", string.punctuation)).split())


def summary(by_seed: Sequence[Sequence[float]]) -> Summary:
    """Mean and sample deviation over the seeds of each score."""
    columns = zip(*by_seed, strict=True)
    return {name: over_seeds(values) for name, values in zip(SCORES, columns, strict=True)}


def over_seeds(values: Sequence[float]) -> dict[str, Any]:
    """One score of each seed, as results.json holds it."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "deviation": deviation, "by_seed": list(values)}


def average(results: Sequence[Mapping[str, Any]]) -> Summary:
    """The mean of several sets of records for each seed, and its deviation over them."""
    columns = [
        [statistics.fmean(values) for values in zip(*(r[name]["by_seed"] for r in results), strict=True)]
        for name in SCORES
    ]
    return summary(list(zip(*columns, strict=True)))


def told(results: Mapping[str, Any]) -> str:
    return "\n".join(
        f"{label} {results[name]['mean']:.2f} +- {results[name]['deviation']:.2f}" for name, label in SCORES.items()
    )
