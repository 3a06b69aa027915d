"""What a report knows of runs: settings, curves, restarts, scores on sets of records; grouped over training seeds."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any
from zlib import crc32

from dskd.config.changes import HARMLESS, flat
from dskd.config.errors import UserError, one_line
from dskd.config.hub import model_name
from dskd.config.load import to_plain
from dskd.config.run import BEST, RunConfig
from dskd.rundir.analysis import Analysis, read_analysis
from dskd.rundir.evaluations import Answer, Evaluation, evaluations_in, read_answers
from dskd.rundir.files import read_json
from dskd.rundir.jobs import Jobs
from dskd.rundir.layout import RunDirectory
from dskd.rundir.read import model_of, read_evaluations, read_run, read_steps

SEED = "train.seed"
SHOWN_EXAMPLES = 3
"""Records of each set whose answers are shown."""
_GOING_ON = re.compile(r"going on after step (\d{1,18})$")
RecordKey = tuple[int, int]
"""Index of a record, and a sum of its prompt: two files may have the same name."""


@dataclass(frozen=True)
class SetScores:
    """One run on one set of records."""

    by_seed: Mapping[str, Mapping[int, float]]
    """Of each metric, by sampling seed."""
    by_record: Mapping[RecordKey, float]
    """ROUGE-L of each record, mean over the sampling seeds."""
    examples: Mapping[RecordKey, Answer]


@dataclass(frozen=True)
class Run:
    directory: Path
    config: RunConfig
    steps: Sequence[Mapping[str, Any]]
    """Lines of metrics.jsonl: of the steps, and of the evaluations during training."""
    evaluations: Sequence[Mapping[str, Any]]
    restarts: Mapping[int, str]
    """Step after which the run was started again, and why, where that is known."""
    sets: Mapping[str, SetScores]
    versions: Mapping[str, str]
    analysis: Analysis | None

    @cached_property
    def settings(self) -> dict[str, Any]:
        """By key, without the place of the output."""
        return {key: v for key, v in flat(to_plain(self.config)) if not key.startswith(("output.", "description"))}

    @property
    def name(self) -> str:
        """Its place, as everywhere in the suite: STUDENT/METHOD/NAME."""
        return str(Path(*self.directory.parts[-3:]))

    @property
    def identity(self) -> str:
        """What makes it this run and no other, but for its seed."""
        return repr([(key, v) for key, v in self.settings.items() if key != SEED and not key.startswith(HARMLESS)])


@dataclass(frozen=True)
class Scored:
    """A row of scores: a group, or a model that is no run's, such as a teacher."""

    label: str
    sets: Sequence[Mapping[str, SetScores]]
    """By the names of the sets; one a run."""

    def scores(self, metric: str, name: str) -> dict[tuple[int, int], float]:
        """On one set of records, by (number of the run, sampling seed)."""
        return {
            (number, seed): score
            for number, sets in enumerate(self.sets)
            if name in sets
            for seed, score in sets[name].by_seed.get(metric, {}).items()
        }

    def by_record(self, name: str) -> dict[RecordKey, float]:
        """ROUGE-L of each record of a set, mean over training and sampling seeds; empty where they disagree on it."""
        found = [sets[name].by_record for sets in self.sets if name in sets]
        if not found or any(each.keys() != found[0].keys() for each in found):
            return {}
        return {key: sum(each[key] for each in found) / len(found) for key in found[0]}


@dataclass(frozen=True)
class Group(Scored):
    """The runs that differ in nothing but train.seed, and in what changes no result."""

    runs: Sequence[Run]

    @property
    def config(self) -> RunConfig:
        return self.runs[0].config


def load(directory: Path) -> Run:
    """Read all of a run, from its resolved path. Raises `UserError` where there is none, or a file of it is damaged."""
    config, place = read_run(directory), RunDirectory(directory)
    folders = [directory]
    if place.best.is_dir():
        folders.insert(0, model_of(directory))  # scores of the model itself before those of whatever was best once
    return Run(
        directory,
        config,
        read_steps(place),
        read_evaluations(place),
        restarts(place),
        sets_in(*folders),
        versions(place),
        read_analysis(directory),
    )


def load_model(folder: Path) -> Scored | None:
    """A model that is no run's, by its evaluations; None where it has none."""
    sets = sets_in(folder)
    return Scored(folder.name, [sets]) if sets else None


def sets_in(*folders: Path) -> dict[str, SetScores]:
    """The evaluations in these folders, by sets of records."""
    by_name: dict[str, list[Evaluation]] = {}
    for evaluation in evaluations_in(*folders):
        by_name.setdefault(evaluation.name, []).append(evaluation)
    return {name: set_scores(found) for name, found in by_name.items()}


def versions(place: RunDirectory) -> dict[str, str]:
    """Which code ran, as args.json has it."""
    args = read_json(place.args) or {}
    packages = args.get("versions")
    own = {name: args.get(name) for name in ("dskd", "git", "python")}
    found = own | (packages if isinstance(packages, dict) else {})
    return {name: str(version) for name, version in found.items() if version is not None}


def restarts(place: RunDirectory) -> dict[int, str]:
    """The log tells of every start that went on from a state; of a submitted run job/ tells why too."""
    found: dict[int, str] = {}
    if place.log.is_file():
        with place.log.open(encoding="utf-8", errors="replace") as lines:
            found = {int(m[1]): "" for line in lines if (m := _GOING_ON.search(line.rstrip()))}
    starts = Jobs(place).starts()
    for before, after in pairwise(starts):
        found[after.step] = before.reason
    return dict(sorted(found.items()))


def set_scores(evaluations: Sequence[Evaluation]) -> SetScores:
    """The evaluations of one run on one set, merged; of a seed that was sampled twice the first counts."""
    by_seed: dict[str, dict[int, float]] = {}
    totals: dict[RecordKey, list[float]] = {}
    examples: dict[RecordKey, Answer] = {}
    seen: set[int] = set()
    for evaluation in evaluations:
        new = [seed for seed in evaluation.seeds if seed not in seen]
        for metric, scores in evaluation.scores.items():
            for seed, score in zip(evaluation.seeds, scores, strict=True):
                if seed in new:
                    by_seed.setdefault(metric, {})[seed] = score
        chosen = set(spread(evaluation.records))
        for answer in read_answers(evaluation):
            if answer.seed in new:
                key = answer.index, crc32(answer.prompt.encode(errors="replace"))
                totals.setdefault(key, []).append(answer.rougel)
                if answer.index in chosen:
                    examples.setdefault(key, answer)
        seen.update(new)
    return SetScores(by_seed, {key: sum(v) / len(v) for key, v in totals.items()}, examples)


def spread(records: int) -> list[int]:
    """Some records from all over a set, the same in each report."""
    return sorted({records * (2 * i + 1) // (2 * SHOWN_EXAMPLES) for i in range(SHOWN_EXAMPLES)}) if records else []


def grouped(runs: Sequence[Run]) -> list[Group]:
    """Groups in the order of their first runs, each with a label of its own."""
    by_identity: dict[str, list[Run]] = {}
    for run in runs:
        by_identity.setdefault(run.identity, []).append(run)
    groups = list(by_identity.values())
    labels = [label_of(group[0], [other[0] for other in groups]) for group in groups]
    twice = {label for label in labels if labels.count(label) > 1}
    numbered = [f"{label} #{i}" if label in twice else label for i, label in enumerate(labels, 1)]
    return [Group(name, [run.sets for run in own], own) for name, own in zip(numbered, groups, strict=True)]


def label_of(run: Run, others: Sequence[Run]) -> str:
    """The method, and as much more as tells the run from the others: its models, then the settings that differ."""
    label, same = run.config.method.kind, others
    for part in (student_of, teacher_of):
        if len({part(other) for other in others} - {""}) > 1:
            label += f" {part(run)}"
        same = [other for other in same if part(other) == part(run)]
    same = [other for other in same if other.config.method.kind == run.config.method.kind]
    return " ".join([label, *list(own_settings(run, same))[:3]]).strip()


def own_settings(run: Run, others: Sequence[Run]) -> Iterator[str]:
    """Settings in which these runs differ, with this one's values."""
    known = (SEED, "student.path", "teacher.path", *HARMLESS)
    for key, value in run.settings.items():
        if not key.startswith(known) and any(other.settings.get(key) != value for other in others):
            yield one_line(f"{key.rpartition('.')[2]}={value}", 60)


def student_of(run: Run) -> str:
    return short_name(run.config.student.path)


def teacher_of(run: Run) -> str:
    """Empty where the method learns from none."""
    teacher = run.config.teacher
    return "" if teacher is None or run.config.method.teacher == "none" else f"from {short_name(teacher.path)}"


def short_name(path: Path) -> str:
    """A model's name; of the best model of a run that of its student."""
    return path.parents[2].name if path.name == BEST and len(path.parents) > 3 else model_name(path)


def find_baselines(groups: Sequence[Group], wanted: str | None) -> dict[str, Group]:
    """For each group, by its label, the one that it is compared with: of the same student where there is one.

    Args:
        wanted: a kind of method, a group's label, or the directory of one of the runs; None takes sft.

    Raises:
        UserError: where it names none of them.
    """
    name = wanted or "sft"
    fitting = [group for group in groups if fits(group, name)]
    if wanted is not None and not fitting:
        allowed = ", ".join(dict.fromkeys(group.config.method.kind for group in groups))
        raise UserError(f"--baseline: {wanted!r} is none of the runs; allowed: {allowed}, or one of the directories")
    found: dict[str, Group] = {}
    for group in groups:
        student = student_of(group.runs[0])
        best = [other for other in fitting if student_of(other.runs[0]) == student] or fitting
        if best and group not in fitting:
            found[group.label] = best[0]
    return found


def fits(group: Group, name: str) -> bool:
    directories = [run.directory for run in group.runs]
    return name in (group.config.method.kind, group.label) or Path(name).resolve() in directories
