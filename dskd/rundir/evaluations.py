"""Finished evaluations as data: scores by seed and answers, from their folders alone."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cattrs

from dskd.config.errors import UserError
from dskd.rundir.files import read_json, read_json_lines
from dskd.rundir.layout import ANSWERS, RESULTS, evaluations_of

LARGEST = 1e12
"""No score is larger, and what is computed of such ones is finite."""
DEEPEST = 4
"""Folders between an evaluation's and that of all evaluations; what lies deeper is no evaluation."""


@dataclass(frozen=True)
class Evaluation:
    """One results.json."""

    folder: Path
    name: str
    """Of the records: the place below the folder of all evaluations, without the seed, and whether it was greedy."""
    records: int
    seeds: tuple[int, ...]
    scores: Mapping[str, tuple[float, ...]]
    """Of each metric, the mean over the records for each seed."""


@dataclass(frozen=True)
class Answer:
    """One line of answers.jsonl; what else the line holds is left out."""

    index: int
    """Of the record."""
    seed: int
    prompt: str
    answer: str
    references: tuple[str, ...]
    rougel: float
    """Best F-measure over the references, times 100."""
    exact_match: float
    """100 where the answer equals a reference, else 0."""


def evaluations_in(*folders: Path) -> Iterator[Evaluation]:
    """The finished evaluations of runs or models, in the order of these folders and by name.

    Raises `UserError` where one is damaged.
    """
    for folder in folders:
        root = evaluations_of(folder)
        for file in sorted(root.rglob(RESULTS)):
            if len(file.relative_to(root).parts) <= DEEPEST:
                yield read_evaluation(file, root)


def read_evaluation(file: Path, root: Path) -> Evaluation:
    found = read_json(file) or {}
    damaged = UserError(f"{file}: is damaged: no scores by seed in it")
    seeds, records, generation = found.get("seeds"), found.get("records"), found.get("generation")
    if not isinstance(seeds, list) or not all(type(seed) is int for seed in seeds) or not isinstance(records, int):
        raise damaged
    scores = {name: by_seed for name, value in found.items() if (by_seed := scores_of(value, len(seeds))) is not None}
    if not scores:
        raise damaged
    places = [part for part in file.parent.relative_to(root).parts if not is_seed(part)]
    greedy = " (greedy)" if isinstance(generation, dict) and generation.get("greedy") is True else ""
    return Evaluation(file.parent, "/".join(places) + greedy, records, tuple(seeds), scores)


def is_seed(name: str) -> bool:
    """Whether a folder is that of one seed of a submitted evaluation; see `evaluation_of`."""
    return name.startswith("seed") and name[4:].isdecimal()


def scores_of(value: Any, seeds: int) -> tuple[float, ...] | None:
    """A metric's scores; None for what is no metric."""
    by_seed = value.get("by_seed") if isinstance(value, dict) else None
    if not isinstance(by_seed, list) or len(by_seed) != seeds:
        return None
    numbers = [float(v) for v in by_seed if type(v) in (int, float) and abs(v) <= LARGEST]
    return tuple(numbers) if len(numbers) == seeds else None


def read_answers(evaluation: Evaluation) -> Iterator[Answer]:
    """The answers of an evaluation, as far as they are there and whole."""
    for line in read_json_lines(evaluation.folder / ANSWERS):
        with suppress(cattrs.BaseValidationError, TypeError, ValueError, KeyError):
            answer = cattrs.structure(line, Answer)
            if abs(answer.rougel) <= LARGEST:
                yield answer
