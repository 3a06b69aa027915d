"""A pipeline: stages that train, run a teacher, let it write, evaluate, compare, make a student or report, by name."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from dskd.config.errors import LAST_SEED, UserError, require, require_at_most
from dskd.config.launch import MOST_HOURS
from dskd.config.models import ModelPath
from dskd.config.names import unknown
from dskd.config.suites import NamedFile, named_files, suite_files
from dskd.config.training import Engine, GenerationConfig

MODELS = ("settings", "teacher", "student")
ARRAY = ("hours", "parallel")
ANSWERS = ("generation", "bos", "precision", "processes", *ARRAY)
USED = {
    "run": (*MODELS, "train_seeds", "parallel"),
    "cache": (*MODELS, "shards", "parallel"),
    "generate": ("teacher", "shards", *ANSWERS),
    "evaluate": ("data", "suite", "data_root", "seeds", "together", *ANSWERS),
    "analyze": ("records", "precision", *ARRAY),
    "make": ("hours",),
    "report": ("runs", "hours"),
}
"""Kinds of stages, and the keys that mean something to each, beside `after`."""


@dataclass(frozen=True)
class MakeConfig:
    """What `dskd student` is given, by the same names."""

    model: ModelPath
    """A model's folder, or the name org/model of one in the local hub cache."""
    out: Path
    """Folder for the student; one that is there is not made again."""
    layers: int | None = None
    """Layers that stay, evenly of the model's, the first and the last always; empty: all."""
    width: int | None = None
    """Hidden size; empty: the model's."""
    heads: int | None = None
    """Query heads, those for keys and values in proportion; empty: the model's."""
    mlp: int | None = None
    """Intermediate size of the MLP; empty: the model's."""
    tokenizer: ModelPath | None = None
    """Another model, whose vocabulary the student gets; empty: the model's own."""
    records: Path | None = None
    """Records: what they use most stays, and layers are refitted to what was left out."""
    tokens: int = 8192
    """How many of their tokens are read."""
    dev: Path | None = None
    """Records on which losses are told: of the model, of the student, of a random one."""

    def __post_init__(self) -> None:
        for name in ("layers", "width", "heads", "mlp"):
            value = getattr(self, name)
            require(value is None or value > 0, name, f"must be above 0, got {value}")
        require(self.tokens >= 256, "tokens", f"must be at least 256, got {self.tokens}")


@dataclass(frozen=True)
class GenerateConfig:
    """What `dskd generate` is given, by the same names."""

    data: Path
    """Records whose prompts are answered, in any form of data.train."""
    out: Path
    """The file of new records; one that is there is not made again."""
    model: ModelPath | None = None
    """A model's folder, or the name org/model of one in the local hub cache; empty: the best model of stage teacher."""
    seed: int = 10
    """Of sampling."""
    whole: bool = False
    """Leave out answers that generation.max_length cuts."""
    engine: Engine = "dskd"
    """What answers."""

    def __post_init__(self) -> None:
        require(0 <= self.seed <= LAST_SEED, "seed", f"must be from 0 to {LAST_SEED}, got {self.seed}")


@dataclass(frozen=True)
class StageConfig:
    run: str | None = None
    """Run file of a stage that trains, relative to the pipeline file."""
    settings: tuple[str, ...] = ()
    """Settings over those of the run file, such as train.lr=1e-4; output.name is the stage's name unless set here."""
    teacher: str | None = None
    """Stage whose best model is the teacher."""
    student: str | None = None
    """Stage whose best model the student starts from, or that makes it."""
    train_seeds: tuple[int, ...] = ()
    """Seeds of several trainings, each a run called STAGE-seedN; empty: one, with the run file's train.seed."""
    cache: str | None = None
    """Run file whose teacher is run once, for teacher.backend=cache, instead of run."""
    shards: int = 1
    """So many jobs divide the records of a cache, or the prompts that are answered."""
    generate: GenerateConfig | None = None
    """Records that a model writes, its answers to prompts, instead of run."""
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
    together: bool = False
    """One job answers a file with all seeds instead: fewer starts, where there are few processors."""
    generation: GenerationConfig = GenerationConfig()
    """How answers are generated."""
    bos: bool = False
    """Put the tokenizer's BOS token before the prompt."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Type of the weights of the model that answers, or of those that are compared."""
    processes: int | None = None
    """Processes that answer in one job; empty means one, or without Slurm one for each GPU."""
    options: tuple[str, ...] = ()
    """Of older pipeline files; generation, bos, precision and processes took its place."""
    analyze: str | None = None
    """Stage whose best models are compared with their teacher, instead of run."""
    records: int = 200
    """The first so many of data.dev are compared."""
    make: MakeConfig | None = None
    """A student to make, instead of run."""
    report: Path | None = None
    """Page of a report to write at each call, instead of run; Markdown is written beside it."""
    runs: tuple[str, ...] = ()
    """Stages whose trainings a report is about; empty: all that train. It waits for them, for their
    evaluations and analyses."""
    hours: float | None = None
    """Time limit of a job; empty takes the cluster profile's. Of a training it stands in the run file."""
    parallel: int | None = None
    """So many jobs of a stage at a time at most; empty: no limit. Without Slurm at most one for each GPU, or processor
    where there is none; empty: one."""
    after: tuple[str, ...] = ()
    """Further stages that must be finished before."""

    def __post_init__(self) -> None:
        kinds = [kind for kind in USED if getattr(self, kind) is not None]
        require(len(kinds) == 1, "run", f"either {', '.join(list(USED)[:-1])} or {list(USED)[-1]} is expected")
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
        (kind,) = kinds
        for field in fields(self):
            used = field.name in (kind, "after", *USED[kind])
            require(used or getattr(self, field.name) == field.default, field.name, f"has no effect beside {kind}")
        if self.generate is not None:
            one = (self.generate.model is None) != (self.teacher is None)
            require(one, "generate.model", "either it or teacher, the stage whose best model answers, is expected")
        for name in ("processes", "hours", "parallel", "shards", "records"):
            value = getattr(self, name)
            require(value is None or value > 0, name, f"must be above 0, got {value}")
        require_at_most(self, 1024, "processes", "shards")
        require_at_most(self, MOST_HOURS, "hours")
        for name, seeds in (("seeds", self.seeds), ("train_seeds", self.train_seeds)):
            valid = len(set(seeds)) == len(seeds) and all(0 <= seed <= LAST_SEED for seed in seeds)
            empty = name == "seeds" and not seeds
            require(valid and not empty, name, f"different whole numbers from 0 to {LAST_SEED} are expected")

    def files(self) -> list[NamedFile]:
        """What an evaluation evaluates on. Raises `UserError` for an unknown suite."""
        listed = named_files(Path(file) for file in self.data)
        return (
            listed if self.suite is None or self.data_root is None else listed + suite_files(self.suite, self.data_root)
        )

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the stages that its own keys name, which must be finished before it."""
        named = (self.teacher, self.student, self.evaluate, self.analyze, *self.after)
        return tuple(dict.fromkeys(name for name in named if name))


@dataclass(frozen=True)
class PipelineConfig:
    stages: dict[str, StageConfig]
    """Stages by name."""
    settings: tuple[str, ...] = ()
    """Settings over those of all its run files, such as train.epochs=3; those of a stage go over them."""
    description: str = ""
    """One line for whoever reads it."""

    def __post_init__(self) -> None:
        require(bool(self.stages), "stages", "at least one is expected")
        for name, stage in self.stages.items():
            for need in (*stage.needs, *stage.runs):
                if need not in self.stages:
                    raise UserError(f"stages.{name}: {need!r}: {unknown('stage', need, self.stages)}")
            for model in filter(None, (stage.teacher, stage.student)):
                other = self.stages[model]
                if other.run is None and other.make is None:
                    raise UserError(f"stages.{name}: {model} trains no model and makes none")
                if len(other.train_seeds) > 1:
                    raise UserError(f"stages.{name}: {model} trains several models (train_seeds), and one is expected")
            for model in filter(None, (stage.evaluate, stage.analyze, *stage.runs)):
                if self.stages[model].run is None:
                    raise UserError(f"stages.{name}: {model} trains no model")
        list(self.ordered())

    def reported(self, stage: StageConfig) -> list[str]:
        """Names of the stages whose trainings a report is about."""
        return list(stage.runs) or [name for name, other in self.stages.items() if other.run is not None]

    def needs(self, name: str) -> tuple[str, ...]:
        """Names of the stages that must be finished before this one."""
        stage = self.stages[name]
        if stage.report is None:
            return stage.needs
        runs = self.reported(stage)
        scores = [other for other, each in self.stages.items() if each.evaluate in runs or each.analyze in runs]
        return tuple(dict.fromkeys([*runs, *scores, *stage.needs]))

    def ordered(self) -> Iterator[str]:
        """Names of the stages, each after those that it needs. Raises `UserError` for a circle."""
        done: set[str] = set()
        while len(done) < len(self.stages):
            ready = [n for n in self.stages if n not in done and done.issuperset(self.needs(n))]
            if not ready:
                raise UserError(f"stages: {', '.join(sorted(set(self.stages) - done))} wait for each other")
            done.update(ready)
            yield from ready
