"""The whole run file, and the checks that look at more than one area."""

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from dskd.config.data import DataConfig
from dskd.config.engine import EngineConfig
from dskd.config.errors import UserError, require
from dskd.config.launch import LaunchConfig
from dskd.config.methods import DualSpaceConfig, MethodConfig
from dskd.config.models import StudentConfig, TeacherConfig
from dskd.config.training import CheckpointConfig, EvalConfig, TrainConfig

BEST = "best"
"""In a run directory, the link to its best model."""


@dataclass(frozen=True)
class OutputConfig:
    root: Path = Path("outputs")
    """Folder that holds all runs; a run goes to ROOT/STUDENT/METHOD/NAME."""
    name: str = "default"
    """Name of this run; a folder that holds another run is never written to."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "root", self.root.absolute())  # like every path of a run file, the default included
        require(
            self.name not in ("", ".", "..") and "/" not in self.name,
            "name",
            f"must be a folder name, got {self.name!r}",
        )


@dataclass(frozen=True)
class RunConfig:
    student: StudentConfig
    """The model that is trained."""
    data: DataConfig
    """Records and their tokenization."""
    method: MethodConfig
    """What is trained for; method.kind decides the other keys."""
    teacher: TeacherConfig | None = None
    """The frozen model that is distilled; not needed by sft."""
    train: TrainConfig = TrainConfig()
    """Optimization."""
    eval: EvalConfig = EvalConfig()
    """Evaluation during training."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Which models are kept."""
    engine: EngineConfig = EngineConfig()
    """DeepSpeed and memory."""
    launch: LaunchConfig = LaunchConfig()
    """Processes."""
    output: OutputConfig = field(default_factory=OutputConfig)
    """Where everything is written."""
    description: str = ""
    """One line for `dskd recipes`."""

    def __post_init__(self) -> None:
        kind = self.method.kind
        require(self.method.teacher == "none" or self.teacher is not None, "teacher", f"method {kind} needs one")
        require(
            self.teacher is None or self.teacher.path != self.student.path,
            "teacher.path",
            f"is the student's path too ({self.student.path}); a model cannot be distilled into itself",
        )
        require(
            self.checkpoint.best_by != "rougel" or self.eval.generate,
            "checkpoint.best_by",
            "rougel needs eval.generate=true",
        )

    @property
    def directory(self) -> Path:
        """The run directory."""
        path = self.student.path
        # ROOT/STUDENT/METHOD/NAME/best is still that student.
        student = path.parents[2].name if path.name == BEST and len(path.parents) > 3 else path.name
        return self.output.root / student / self.method.kind / self.output.name


def accumulation_steps(run: RunConfig, world_size: int) -> int:
    """Micro-batches that each of `world_size` ranks runs for one optimizer step.

    Raises `UserError` where the global batch does not divide.
    """
    per_pass = run.train.micro_batch_size * world_size
    if run.train.global_batch_size % per_pass:
        raise UserError(
            f"train.global_batch_size: {run.train.global_batch_size} does not divide into {world_size} rank(s) x "
            f"train.micro_batch_size {run.train.micro_batch_size}; a multiple of {per_pass} is allowed"
        )
    return run.train.global_batch_size // per_pass


def models_of(run: RunConfig) -> list[Path]:
    """The model folders that a run reads."""
    taught = run.teacher is not None and run.method.teacher != "none"
    teacher = [run.teacher.path, run.teacher.adapter] if taught and run.teacher is not None else []
    projectors = run.method.projectors_from if isinstance(run.method, DualSpaceConfig) else None
    return [path for path in (run.student.path, *teacher, projectors) if path is not None]


def written_folders(run: RunConfig) -> list[Path]:
    """The folders outside of any other that a run writes to."""
    found = (run.output.root, run.checkpoint.scratch_dir, run.data.cache_dir)
    return [path for path in found if path is not None]


def check_paths(run: RunConfig, coming: Collection[Path] = ()) -> None:
    """Raise `UserError` for the first file or folder of the run that is missing; models in `coming` may be."""
    for key, file in (("data.train", run.data.train), ("data.dev", run.data.dev)):
        require(file.is_file(), key, f"no such file: {file}")
    if run.student.path not in coming:
        check_model_folder("student.path", run.student.path)
    if run.teacher is not None and run.method.teacher != "none":
        if run.teacher.path not in coming:
            check_model_folder("teacher.path", run.teacher.path)
        if run.teacher.adapter is not None:
            adapter = run.teacher.adapter / "adapter_config.json"
            require(adapter.is_file(), "teacher.adapter", f"no LoRA adapter (adapter_config.json) in {adapter.parent}")


def check_model_folder(key: str, folder: Path) -> None:
    """Raise `UserError` unless `folder` holds a configuration and safetensors weights."""
    require(folder.is_dir(), key, f"no such folder: {folder} (a downloaded Hugging Face model is expected)")
    require((folder / "config.json").is_file(), key, f"no config.json in {folder}")
    weights = any(folder.glob("*.safetensors"))
    require(weights, key, f"no weights in {folder}: a .safetensors file is expected (pickled .bin files are not read)")


def check_checkpoint(folder: Path) -> None:
    """Raise `UserError` unless `folder` is a saved model: a whole one, or a LoRA adapter."""
    if not (folder / "adapter_config.json").is_file():
        check_model_folder(str(folder), folder)
