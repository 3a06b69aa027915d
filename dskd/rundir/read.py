"""A run as data: settings, steps, scores and states, from its directory alone, while it runs or after."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cattrs

from dskd.config.errors import UserError
from dskd.config.load import load_run, override
from dskd.config.run import RunConfig
from dskd.rundir.files import read_json, read_json_lines
from dskd.rundir.layout import RESULTS, RunDirectory, StateName
from dskd.rundir.shard import read_shard
from dskd.rundir.train_state import TrainState, read_state

TAIL_BYTES = 1 << 16


def read_run(path: Path) -> RunConfig:
    """The settings of the run that a directory holds, wherever the directory lies by now. Raises `UserError`."""
    path = path.absolute()
    require_run(path)
    run = load_run(RunDirectory(path).settings)
    if run.directory == path:
        return run
    if len(path.parents) < 3 or path.parts[-3:-1] != run.directory.parts[-3:-1]:
        expected = Path(*run.directory.parts[-3:])
        raise UserError(f"{path}: a run directory that was moved must still end in {expected}")
    return replace(run, output=replace(run.output, root=path.parents[2], name=path.name))


def read_changed(path: Path, overrides: Sequence[str]) -> RunConfig:
    """The same with some settings changed. Raises `UserError` where it would be a run in another directory."""
    before = read_run(path)
    run = override(before, overrides)
    if run.directory != before.directory:
        raise UserError(
            f"{path}: {' '.join(overrides)} makes it another run, in {run.directory}; `dskd train` begins one"
        )
    return run


def require_run(path: Path) -> None:
    """Raise `UserError` where a directory holds no run."""
    if not RunDirectory(path).settings.is_file():
        raise UserError(f"{path}: no run.yaml: a run directory is expected, as `dskd train` writes it")


def model_of(path: Path) -> Path:
    """A saved model: `path`, or of a run directory the best one. Raises `UserError` where a run has none yet."""
    directory = RunDirectory(path)
    if not directory.settings.is_file():
        return path
    if not directory.best.is_dir():
        raise UserError(f"{path}: the run has saved no model yet")
    return path / directory.best.readlink() if directory.best.is_symlink() else directory.best


@dataclass(frozen=True)
class RunLength:
    """How long a run is, as args.json says it since its last start."""

    total_steps: int
    steps_per_epoch: int


def read_length(directory: RunDirectory) -> RunLength | None:
    """None for a run that has not begun, or that a version of dskd began which did not write it down."""
    found = (read_json(directory.args) or {}).get("length")
    try:
        return None if found is None else cattrs.structure(found, RunLength)
    except (cattrs.BaseValidationError, TypeError, ValueError, KeyError):
        raise UserError(f"{directory.args}: is damaged: it does not say how long the run is") from None


def known_length(directory: RunDirectory) -> RunLength | None:
    """The same, and None where args.json is damaged: the next start writes it anew."""
    with suppress(UserError):
        return read_length(directory)
    return None


def read_steps(directory: RunDirectory, last_bytes: int | None = None) -> list[dict[str, Any]]:
    """The training steps of metrics.jsonl; with `last_bytes` those of its end alone."""
    lines, numbers = read_json_lines(directory.metrics, last_bytes), ("step", "seconds", "tokens_per_second")
    return [line for line in lines if all(isinstance(line.get(name), (int, float)) for name in numbers)]


def read_evaluations(directory: RunDirectory) -> list[dict[str, Any]]:
    """The evaluations during training: step, dev_loss, dev_accuracy, and dev_rougel where answers were generated."""
    return [line for line in read_json_lines(directory.metrics) if "dev_loss" in line]


def read_rougel(evaluation: Path) -> float | None:
    """Mean ROUGE-L over the seeds of a finished evaluation. Raises `UserError` where its results are damaged."""
    results = read_json(evaluation / RESULTS)
    if results is None:
        return None
    try:
        return float(results["rougel"]["mean"])
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{evaluation / RESULTS}: is damaged: no ROUGE-L in it") from None


def newest_state(directory: RunDirectory) -> StateName | None:
    """Name of the last complete state, None without one. Raises `UserError` where LATEST is no name of a state."""
    try:
        text = directory.latest.read_text(encoding="utf-8", errors="replace").strip()
    except FileNotFoundError:
        return None
    name = StateName.parse(text)
    if name is None:
        raise UserError(f"{directory.latest}: is damaged: {text[:40]!r} names no state")
    return name


def read_train_state(directory: RunDirectory) -> TrainState | None:
    """Where the run stands by its last complete state. Raises `UserError` where that is damaged."""
    name = newest_state(directory)
    found = None if name is None else read_state(directory.state(name))
    return None if found is None else found.state


def is_complete(directory: RunDirectory) -> bool:
    """Whether a run has made its last step, an evaluation has its results, or a shard of a cache is made."""
    if read_rougel(directory.path) is not None:
        return True
    shard = read_shard(directory)
    if shard is not None:
        return shard.is_complete
    state = read_train_state(directory)
    return state is not None and has_ended(directory, state)


def has_ended(directory: RunDirectory, state: TrainState) -> bool:
    """Whether the last step is made. A finished run may have been given more, and not have saved a state since."""
    length = known_length(directory)
    return state.finished and (length is None or state.step >= length.total_steps)
