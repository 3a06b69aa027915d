"""ROUGE-L and exact match of answers, and their mean and deviation over seeds."""

import statistics
import string
from collections.abc import Sequence
from typing import Any

from rouge_score.rouge_scorer import RougeScorer

SCORES = ("rougel", "exact_match")


def score(answer: str, references: Sequence[str], scorer: RougeScorer) -> tuple[float, float]:
    """ROUGE-L F-measure (stemmed) and exact match, best over the references, times 100."""
    rougel = max(scorer.score(reference, answer)["rougeL"].fmeasure for reference in references)
    exact = any(normalize(answer) == normalize(reference) for reference in references)
    return 100 * rougel, 100.0 * exact


def normalize(text: str) -> str:
    """Lower case, no punctuation, single spaces."""
    return " ".join(text.lower().translate(str.maketrans("", "", string.punctuation)).split())


def summary(by_seed: Sequence[tuple[float, float]]) -> dict[str, dict[str, Any]]:
    """Mean and sample deviation over the seeds of each score."""
    columns = zip(*by_seed, strict=True)
    return {
        name: {
            "mean": statistics.fmean(values),
            "deviation": statistics.stdev(values) if len(values) > 1 else 0.0,
            "by_seed": list(values),
        }
        for name, values in zip(SCORES, columns, strict=True)
    }
