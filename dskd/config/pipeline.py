"""A pipeline: stages that train or evaluate, and that use each other's models by name."""

from collections.abc import Iterator
from dataclasses import dataclass

from dskd.config.errors import UserError, require
from dskd.config.load import unknown


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
    evaluate: str | None = None
    """Stage whose best model is evaluated, instead of run."""
    data: tuple[str, ...] = ()
    """Files of records to evaluate on."""
    seeds: tuple[int, ...] = (10, 20, 30, 40, 50)
    """Sampling seeds; each file with each seed is one job."""
    options: tuple[str, ...] = ()
    """Further options of `dskd evaluate`, such as --greedy."""
    hours: float | None = None
    """Time limit of an evaluation; empty takes the cluster profile's."""
    parallel: int | None = None
    """So many evaluations at a time at most; empty: no limit."""
    after: tuple[str, ...] = ()
    """Further stages that must be finished before."""

    def __post_init__(self) -> None:
        require((self.run is None) != (self.evaluate is None), "run", "either run or evaluate is expected")
        require(self.evaluate is None or bool(self.data), "data", "is missing; an evaluation needs files of records")
        names = ("settings", "teacher", "student") if self.evaluate else ("data", "options", "hours", "parallel")
        for name in names:
            require(not getattr(self, name), name, f"has no effect beside {'evaluate' if self.evaluate else 'run'}")
        require(self.parallel is None or self.parallel > 0, "parallel", f"must be above 0, got {self.parallel}")

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
