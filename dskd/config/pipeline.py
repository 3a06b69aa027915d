"""A pipeline: stages that train, evaluate or run a teacher, and that use each other's models by name."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from dskd.config.errors import LAST_SEED, UserError, require, require_at_most
from dskd.config.launch import MOST_HOURS
from dskd.config.names import unknown
from dskd.config.suites import NamedFile, named_files, suite_files
from dskd.config.training import GenerationConfig

TRAINING = ("settings", "teacher", "student")
EVALUATION = ("data", "suite", "data_root", "seeds", "generation", "bos", "precision", "processes", "hours")
UNUSED = {
    "run": (*EVALUATION, "parallel", "shards"),
    "cache": EVALUATION,
    "evaluate": (*TRAINING, "shards"),
}
"""Kinds of stages, and the keys that mean nothing to each."""


@dataclass(frozen=True)
class StageConfig:
    run: str | None = None
    """Run file of a stage that trains, relative to the pipeline file."""
    settings: tuple[str, ...] = ()
    """Settings over those of the run file, such as train.lr=1e-4; output.name is the stage's name unless set here."""
    teacher: str | None = None
    """Stage whose best model is the teacher."""
    student: str | None = None
    """Stage whose best model the student starts from."""
    cache: str | None = None
    """Run file whose teacher is run once, for teacher.backend=cache, instead of run."""
    shards: int = 1
    """So many jobs divide the records of a cache."""
    evaluate: str | None = None
    """Stage whose best model is evaluated, instead of run."""
    data: tuple[str, ...] = ()
    """Files of records to evaluate on."""
    suite: str | None = None
    """A suite to evaluate on, such as paper: the files that it names in data_root."""
    data_root: Path | None = None
    """Folder of the files of a suite."""
    seeds: tuple[int, ...] = (10, 20, 30, 40, 50)
    """Sampling seeds; each file with each seed is one job."""
    generation: GenerationConfig = GenerationConfig()
    """How answers are generated."""
    bos: bool = False
    """Put the tokenizer's BOS token before the prompt."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Type of the weights of the evaluated model."""
    processes: int | None = None
    """Processes of one evaluation; empty means one, or without Slurm one for each GPU."""
    options: tuple[str, ...] = ()
    """Of older pipeline files; generation, bos, precision and processes took its place."""
    hours: float | None = None
    """Time limit of an evaluation; empty takes the cluster profile's."""
    parallel: int | None = None
    """So many evaluations or shards at a time at most; empty: no limit."""
    after: tuple[str, ...] = ()
    """Further stages that must be finished before."""

    def __post_init__(self) -> None:
        kinds = [kind for kind in UNUSED if getattr(self, kind) is not None]
        require(len(kinds) == 1, "run", "either run, cache or evaluate is expected")
        evaluates = bool(self.data) or self.suite is not None
        require(
            self.evaluate is None or evaluates, "data", "is missing; an evaluation needs files of records, or a suite"
        )
        both = (self.suite is None) == (self.data_root is None)
        require(both, "data_root", "suite and data_root are expected together")
        self.files()
        require(
            not self.options,
            "options",
            "are settings now: generation (greedy, temperature, top_p, max_length, max_prompt_length, batch_size), "
            "bos, precision and processes",
        )
        (kind,), defaults = kinds, {field.name: field.default for field in fields(self)}
        for name in UNUSED[kind]:
            require(getattr(self, name) == defaults[name], name, f"has no effect beside {kind}")
        for name in ("processes", "hours", "parallel", "shards"):
            value = getattr(self, name)
            require(value is None or value > 0, name, f"must be above 0, got {value}")
        require_at_most(self, 1024, "processes", "shards")
        require_at_most(self, MOST_HOURS, "hours")
        different = bool(self.seeds) and len(set(self.seeds)) == len(self.seeds)
        valid = different and all(0 <= seed <= LAST_SEED for seed in self.seeds)
        require(valid, "seeds", f"different whole numbers from 0 to {LAST_SEED} are expected")

    def files(self) -> list[NamedFile]:
        """What an evaluation evaluates on. Raises `UserError` for an unknown suite."""
        listed = named_files(Path(file) for file in self.data)
        return (
            listed if self.suite is None or self.data_root is None else listed + suite_files(self.suite, self.data_root)
        )

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the stages that must be finished before this one."""
        return tuple(dict.fromkeys(n for n in (self.teacher, self.student, self.evaluate, *self.after) if n))


@dataclass(frozen=True)
class PipelineConfig:
    stages: dict[str, StageConfig]
    """Stages by name."""
    description: str = ""
    """One line for whoever reads it."""

    def __post_init__(self) -> None:
        require(bool(self.stages), "stages", "at least one is expected")
        for name, stage in self.stages.items():
            for need in stage.needs:
                if need not in self.stages:
                    raise UserError(f"stages.{name}: {need!r}: {unknown('stage', need, self.stages)}")
            for model in (stage.teacher, stage.student, stage.evaluate):
                if model and self.stages[model].run is None:
                    raise UserError(f"stages.{name}: {model} trains no model")
        list(self.ordered())

    def ordered(self) -> Iterator[str]:
        """Names of the stages, each after those that it needs. Raises `UserError` for a circle."""
        done: set[str] = set()
        while len(done) < len(self.stages):
            ready = [n for n, stage in self.stages.items() if n not in done and done.issuperset(stage.needs)]
            if not ready:
                raise UserError(f"stages: {', '.join(sorted(set(self.stages) - done))} wait for each other")
            done.update(ready)
            yield from ready
