"""Every name in a run directory, once. The training core and the launcher share only files, and these are their names.

OUTPUT.ROOT/STUDENT/METHOD/NAME/
  run.yaml args.json                 what runs, resolved; with versions, git revision and the number of steps
  train.log metrics.jsonl            the log; one JSON object a step, and one an evaluation
  tensorboard/ wandb/                where tensorboard is installed; where report.trackers has wandb
  epoch3_step900_loss2.4512_rougel24.1031/
                                     a saved model, its projectors.safetensors and MANIFEST.json (sizes, sha256)
  best                               link to the best of these
  damaged-NAME.N                     a model, or in resume/ a state, that was found to be damaged
  resume/step900/rankR.safetensors   the state that the run goes on from, with state.json and MANIFEST.json
  resume/LATEST                      name of the newest state
  job/                               of a submitted run, see `JobFolder`
  analysis.json                      how near its best model came to the teacher
  eval/DATA/                         answers.jsonl and results.json of an evaluation; answers.partial.jsonl on the way
  shard.json                         of a shard of a teacher's cache, all but job/: how much of it is made
  .lock/                             who works here now
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from dskd.config.run import BEST, RunConfig

MANIFEST = "MANIFEST.json"
PROJECTORS = "projectors.safetensors"
STATE = "state.json"
RESULTS = "results.json"
ANSWERS = "answers.jsonl"
PARTIAL_ANSWERS = "answers.partial.jsonl"
"""Those that are made so far, while an evaluation is under way."""
JUDGED = "judge.jsonl"
"""What a judge has replied to them."""
INDEX = "index.json"
"""What `dskd collect` writes beside the models that it gathered."""

# Up to 18 digits: what is longer is no name that was written here, and no number that Python reads.
_MODEL = re.compile(
    r"epoch(\d{1,18})_step(\d{1,18})_loss(-?\d+(?:\.\d+)?|nan|-?inf)(?:_rougel(\d+(?:\.\d+)?))?", re.ASCII
)
_BEFORE = "-before-evaluation"
_STATE = re.compile(rf"step(\d{{1,18}})({_BEFORE})?", re.ASCII)
_LOG = re.compile(r"start(\d{1,18})\.rank\d+\.log", re.ASCII)


@dataclass(frozen=True)
class ModelName:
    """The name of a saved model's folder tells its place in the run and its scores on the dev records."""

    epoch: int
    step: int
    loss: float
    rougel: float | None = None

    def __str__(self) -> str:
        rougel = "" if self.rougel is None else f"_rougel{self.rougel:.4f}"
        return f"epoch{self.epoch}_step{self.step}_loss{self.loss:.4f}{rougel}"

    @classmethod
    def parse(cls, name: str) -> Self | None:
        """None for the name of anything else."""
        found = _MODEL.fullmatch(name)
        if found is None:
            return None
        return cls(int(found[1]), int(found[2]), float(found[3]), None if found[4] is None else float(found[4]))


@dataclass(frozen=True, order=True)
class StateName:
    """The name of a state's folder. Of two states after one step, the one with its evaluation done is newer."""

    step: int
    evaluated: bool = True

    def __str__(self) -> str:
        return f"step{self.step}" + ("" if self.evaluated else _BEFORE)

    @classmethod
    def parse(cls, name: str) -> Self | None:
        """None for the name of anything else."""
        found = _STATE.fullmatch(name)
        return None if found is None else cls(int(found[1]), found[2] is None)


@dataclass(frozen=True)
class RunDirectory:
    """A run directory: where everything in it lies."""

    path: Path

    @classmethod
    def of(cls, run: RunConfig) -> Self:
        return cls(run.directory)

    @property
    def settings(self) -> Path:
        return self.path / "run.yaml"

    @property
    def args(self) -> Path:
        return self.path / "args.json"

    @property
    def log(self) -> Path:
        return self.path / "train.log"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def best(self) -> Path:
        return self.path / BEST

    @property
    def lock(self) -> Path:
        return self.path / ".lock"

    @property
    def job(self) -> "JobFolder":
        return JobFolder(self.path / "job")

    @property
    def evaluations(self) -> Path:
        return evaluations_of(self.path)

    @property
    def shard(self) -> Path:
        return self.path / "shard.json"

    @property
    def states(self) -> Path:
        return self.path / "resume"

    @property
    def latest(self) -> Path:
        return self.states / "LATEST"

    def state(self, name: StateName) -> Path:
        return self.states / str(name)

    def state_names(self) -> list[StateName]:
        """Of all published states, the newest first."""
        names = [StateName.parse(path.name) for path in self.states.glob("step*")]
        return sorted((name for name in names if name is not None), reverse=True)

    def model(self, name: ModelName) -> Path:
        return self.path / str(name)

    def models(self) -> Iterator[tuple[Path, ModelName]]:
        """The folders of saved models, by name; one without a manifest is not complete."""
        for folder in sorted(self.path.glob("epoch*")):
            name = ModelName.parse(folder.name)
            if name is not None and folder.is_dir():
                yield folder, name

    def unfinished(self) -> Iterator[Path]:
        """What a killed process may have left half done: hidden names of what would have become a file or folder."""
        for name in (f"{self.settings.name}.", f"{self.args.name}.", "epoch"):
            yield from self.path.glob(f".{name}*")
        for name in ("step", f"{self.latest.name}."):
            yield from self.states.glob(f".{name}*")
        yield from self.lock.glob(".*")

    def has_begun(self) -> bool:
        """Whether there is anything but what may be in the directory of a run that has not begun."""
        before = {self.job.path.name, self.evaluations.name, self.lock.name}
        return self.path.is_dir() and any(path.name not in before for path in self.path.iterdir())


@dataclass(frozen=True)
class JobFolder:
    """What a run directory tells about its jobs.

    job.json starts.jsonl       what was submitted; every start and how it ended
    run.yaml cluster.yaml       the run file and the cluster profile, resolved
    script.sh                   the batch script
    logs/startN.rankR.log       what rank R wrote in start N
    submitit/                   submitit's files and logs; those of an array lie in OUTPUT.ROOT/arrays
    ending cancel               marks: how the first rank ended that did not finish; the user asks to stop
    claim                       locked while someone submits the run
    meeting.json                port and secret of the ranks of the newest start
    """

    path: Path

    @property
    def submission(self) -> Path:
        return self.path / "job.json"

    @property
    def starts(self) -> Path:
        return self.path / "starts.jsonl"

    @property
    def settings(self) -> Path:
        return self.path / "run.yaml"

    @property
    def cluster(self) -> Path:
        return self.path / "cluster.yaml"

    @property
    def script(self) -> Path:
        return self.path / "script.sh"

    @property
    def submitted(self) -> tuple[Path, ...]:
        """What a submission writes."""
        return self.submission, self.settings, self.cluster, self.script

    @property
    def submitit(self) -> Path:
        return self.path / "submitit"

    @property
    def claim(self) -> Path:
        return self.path / "claim"

    @property
    def meeting(self) -> Path:
        return self.path / "meeting.json"

    @property
    def ending(self) -> Path:
        return self.path / "ending"

    @property
    def cancel(self) -> Path:
        return self.path / "cancel"

    def log(self, start: int, rank: int) -> Path:
        return self.path / "logs" / f"start{start}.rank{rank}.log"

    def logs(self, rank: int) -> list[Path]:
        """The logs of one rank, in the order of the starts."""
        found = [(int(m[1]), f) for f in self.path.glob(f"logs/start*.rank{rank}.log") if (m := _LOG.fullmatch(f.name))]
        return [file for _, file in sorted(found)]


def runs_file(submission: Path) -> Path:
    """In the folder of a submission, the list of its run directories."""
    return submission / "runs.txt"


def arrays_folder(root: Path) -> Path:
    """Where the files of job arrays lie, beside the runs."""
    return root / "arrays"


def evaluations_of(folder: Path) -> Path:
    """Where the evaluations of a run, or of one model, lie."""
    return folder / "eval"


def analysis_of(folder: Path) -> Path:
    """The analysis of a run, or of one model."""
    return folder / "analysis.json"


def evaluation_of(folder: Path, name: str, seed: int | None = None) -> Path:
    """The folder of one evaluation, by the name of its records; submitted ones have one a seed."""
    evaluation = evaluations_of(folder) / name
    return evaluation if seed is None else evaluation / f"seed{seed}"


def part_of(out: Path, index: int, count: int) -> Path:
    """What task `index` of `count` has written so far of a file of answers."""
    return out.with_name(f"{out.name}.{index:05}-of-{count:05}.partial")


def rank_file(state: Path, rank: int) -> Path:
    """What one rank holds of weights and optimizer, in a state's folder."""
    return state / f"rank{rank}.safetensors"


def set_aside(path: Path) -> Path:
    """The name of a damaged state or model, under which it does not count but is not lost either."""
    number = next(n for n in range(1, 10**6) if not path.with_name(f"damaged-{path.name}.{n}").exists())
    return path.with_name(f"damaged-{path.name}.{number}")


def beside(path: Path, word: str) -> Path:
    """A hidden name for what is to become `path`, or was; `RunDirectory.unfinished` finds it."""
    return path.with_name(f".{path.name}.{word}")
