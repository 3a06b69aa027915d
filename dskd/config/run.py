"""The whole run file, and the checks that look at more than one area."""

import json
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile

from dskd.config.data import DataConfig
from dskd.config.engine import EngineConfig
from dskd.config.errors import UserError, require, shown
from dskd.config.hub import cache_folder, hub_name, model_name
from dskd.config.launch import LaunchConfig
from dskd.config.methods import DualSpaceConfig, MethodConfig
from dskd.config.models import StudentConfig, TeacherConfig
from dskd.config.report import ReportConfig
from dskd.config.training import CheckpointConfig, EvalConfig, TrainConfig

BEST = "best"
"""In a run directory, the link to its best model."""
LONGEST_NAME = 200
"""Bytes of a run's name: file systems take 255, and files that are on their way have longer ones."""


@dataclass(frozen=True)
class OutputConfig:
    root: Path = Path("outputs")
    """Folder that holds all runs; a run goes to ROOT/STUDENT/METHOD/NAME."""
    name: str = "default"
    """Name of this run; a folder that holds another run is never written to."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "root", self.root.absolute())  # like every path of a run file, the default included
        require(
            self.name not in ("", ".", "..") and "/" not in self.name and len(os.fsencode(self.name)) <= LONGEST_NAME,
            "name",
            f"must be a folder name of at most {LONGEST_NAME} bytes, got {shown(self.name)}",
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
    report: ReportConfig = ReportConfig()
    """Live trackers."""
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
        tokens, longest = self.train.micro_batch_tokens, self.data.max_length
        require(
            tokens is None or tokens >= longest,
            "train.micro_batch_tokens",
            f"must be at least data.max_length ({longest}), so that every record fits, got {tokens}",
        )

    @property
    def cache_folder(self) -> Path:
        """Where what many runs share is kept."""
        return self.data.cache_dir or self.output.root / "cache"

    @property
    def directory(self) -> Path:
        """The run directory."""
        path = self.student.path
        # ROOT/STUDENT/METHOD/NAME/best is still that student.
        student = path.parents[2].name if path.name == BEST and len(path.parents) > 3 else model_name(path)
        return self.output.root / student / self.method.kind / self.output.name


def accumulation_steps(run: RunConfig, world_size: int) -> int:
    """Micro-batches that each of `world_size` ranks runs for one optimizer step; of so many tokens, at most so many.

    Raises `UserError` where the global batch does not divide.
    """
    train = run.train
    each = train.micro_batch_size if train.micro_batch_tokens is None else 1
    per_pass = each * world_size
    if train.global_batch_size % per_pass:
        size = f" x train.micro_batch_size {each}" if train.micro_batch_tokens is None else ""
        raise UserError(
            f"train.global_batch_size: {train.global_batch_size} does not divide into {world_size} rank(s){size}; "
            f"a multiple of {per_pass} is allowed"
        )
    return train.global_batch_size // per_pass


def tokens_at_a_time(run: RunConfig) -> int:
    """Tokens, padding included, that one rank holds at most of one side."""
    return run.train.micro_batch_tokens or run.train.micro_batch_size * run.data.max_length


def models_of(run: RunConfig) -> list[Path]:
    """The model folders that a run reads."""
    return list(models_by_key(run).values())


def models_by_key(run: RunConfig) -> dict[str, Path]:
    found: dict[str, Path | None] = {"student.path": run.student.path}
    if run.teacher is not None and run.method.teacher != "none":
        found |= {"teacher.path": run.teacher.path, "teacher.adapter": run.teacher.adapter}
    if isinstance(run.method, DualSpaceConfig):
        found["method.projectors_from"] = run.method.projectors_from
    return {key: path for key, path in found.items() if path is not None}


def written_folders(run: RunConfig) -> list[Path]:
    """The folders outside of any other that a run writes to."""
    return list(written_by_key(run).values())


def written_by_key(run: RunConfig) -> dict[str, Path]:
    found = {
        "output.root": run.output.root,
        "checkpoint.scratch_dir": run.checkpoint.scratch_dir,
        "data.cache_dir": run.data.cache_dir,
    }
    return {key: path for key, path in found.items() if path is not None}


def check_paths(run: RunConfig, coming: Collection[Path] = ()) -> None:
    """Raise `UserError` for the first file or folder of the run that is missing; what is in `coming` may be."""
    for key, file in (("data.train", run.data.train), ("data.dev", run.data.dev)):
        with looked_at(key):
            require(file in coming or file.is_file(), key, f"no such file: {file}")
    if run.student.path not in coming:
        check_model_folder("student.path", run.student.path)
        check_length("data.max_length", run.data.max_length, run.student.path)
        if run.eval.generate:
            check_length("eval.generation.max_length", run.eval.generation.max_length, run.student.path)
    if run.teacher is not None and run.method.teacher != "none":
        if run.teacher.path not in coming:
            check_model_folder("teacher.path", run.teacher.path)
            check_length("data.max_length", run.data.max_length, run.teacher.path)
        if run.teacher.adapter is not None:
            adapter = run.teacher.adapter / "adapter_config.json"
            with looked_at("teacher.adapter"):
                found = adapter.is_file()
            require(found, "teacher.adapter", f"no LoRA adapter (adapter_config.json) in {adapter.parent}")
            check_object("teacher.adapter", adapter)
    projectors = models_by_key(run).get("method.projectors_from")
    if projectors is not None:
        require_folder("method.projectors_from", projectors)


def check_folders(run: RunConfig) -> None:
    """Raise `UserError` for the first folder outside of any other that the run could not write to, on this machine."""
    for key, folder in written_by_key(run).items():
        check_folder(key, folder)


def check_folder(key: str, folder: Path) -> None:
    """Raise `UserError` where a folder cannot be made, or not be written to."""
    folder = folder.absolute()
    with looked_at(key):
        nearest = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
        require(nearest.is_dir(), key, f"cannot write {folder}: {nearest} is no folder")
    require(os.access(nearest, os.W_OK | os.X_OK), key, f"cannot write {folder}: {nearest} is not writable")
    try:
        with TemporaryFile(dir=nearest):  # what the rights allow the disk may still refuse
            pass
    except OSError as error:
        raise UserError(f"{key}: cannot write {folder}: {nearest}: {error.strerror}") from None


@contextmanager
def looked_at(key: str) -> Iterator[None]:
    """A file or folder that the system does not let us look at is told in one line."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{key}: {error.filename} cannot be read: {error.strerror}") from None


def check_model_folder(key: str, folder: Path) -> None:
    """Raise `UserError` unless `folder` holds a configuration and safetensors weights."""
    require_folder(key, folder)
    with looked_at(key):
        config, adapter = (folder / "config.json").is_file(), (folder / "adapter_config.json").is_file()
    whole = " and teacher.adapter this one" if key == "teacher.path" else ""
    require(
        config or not adapter, key, f"{folder} is a LoRA adapter; {key} takes the whole model that it is for{whole}"
    )
    with looked_at(key):
        best = f"; it is a run's directory, and its best model is {folder / BEST}" if holds_run(folder) else ""
    require(config, key, f"no config.json in {folder}{best}")
    with looked_at(key):
        weights = any(folder.glob("*.safetensors"))
    require(
        weights,
        key,
        f"no weights in {folder}: a .safetensors file is expected (pickled .bin files are not read; see dskd convert)",
    )
    for name in ("config.json", "tokenizer_config.json"):
        check_object(key, folder / name)


def holds_run(folder: Path) -> bool:
    """Whether a run has saved its best model there."""
    return (folder / "run.yaml").is_file() and (folder / BEST).is_dir()


def require_folder(key: str, folder: Path, enough: str = "") -> None:
    """Raise `UserError` where a model's folder is not there.

    Args:
        enough: the one file of the model that is needed; empty: all of it.
    """
    name = hub_name(folder)
    hint = f"a folder with a model's {enough} is enough" if enough else "a downloaded Hugging Face model is expected"
    if name is not None:
        hint = f"nor is {name} in {cache_folder()}; to download it: {f'hf download {name} {enough}'.rstrip()}"
    with looked_at(key):
        require(folder.is_dir(), key, f"no such folder: {folder} ({hint})")


def check_length(key: str, length: int, folder: Path) -> None:
    """Raise `UserError` where a model, looked at before, says that it has fewer positions."""
    file = folder / "config.json"
    if not file.is_file():
        return  # an adapter
    with looked_at(key):
        config = json.loads(file.read_bytes())
    inner = config.get("text_config")  # of a model that takes images too
    for values in (config, inner if isinstance(inner, dict) else {}):
        for name in ("max_position_embeddings", "n_positions"):
            most = values.get(name)
            fits = not isinstance(most, int) or most <= 0 or length <= most
            require(fits, key, f"{length} is more than the {most} positions of {folder}")


def check_object(key: str, file: Path) -> None:
    """Raise `UserError` where a file is there and holds no JSON object."""
    with looked_at(key):
        if not file.is_file():
            return
        text = file.read_bytes()
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    require(isinstance(found, dict), key, f"{file} holds no JSON object")


def check_checkpoint(folder: Path) -> None:
    """Raise `UserError` unless `folder` is a saved model: a whole one, or a LoRA adapter."""
    with looked_at(str(folder)):
        adapter = (folder / "adapter_config.json").is_file()
    if adapter:
        check_object(str(folder), folder / "adapter_config.json")
    else:
        check_model_folder(str(folder), folder)
