"""Saved models of many runs in one place: copied, verified, and listed in index.json. Torch-free."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cattrs

from dskd.config.errors import UserError
from dskd.rundir.files import (
    as_user_error,
    copy_verified,
    damage,
    publish,
    read_manifest,
    sha256,
    write_json,
)
from dskd.rundir.layout import INDEX, MANIFEST, ModelName, RunDirectory, beside
from dskd.rundir.read import require_run


@dataclass(frozen=True)
class Collected:
    """A line of the index."""

    folder: str
    """Where the model lies, relative to the index: STUDENT/METHOD/NAME/MODEL as in the run's path."""
    run: str
    """The run directory that it came from."""
    step: int
    dev_loss: float
    rougel: float | None
    size: int
    """Bytes of all its files."""
    sha256: str
    """Of MANIFEST.json, which holds those of all files."""


def runs_among(paths: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Those that are run directories, and what else a pattern such as outputs/*/*/* finds.

    Raises `UserError` where none is one.
    """
    runs = [path for path in paths if RunDirectory(path).settings.is_file()]
    if not runs:
        for path in paths:
            require_run(path)
    return runs, [path for path in paths if path not in runs]


def collect(run_directories: Sequence[Path], to: Path) -> list[Collected]:
    """Copy the saved models of these runs below `to`; returns the whole index, earlier calls' models included.

    A model that is there already is not copied again, and a copy that broke off goes on with the file where it did.

    Raises:
        UserError: where a directory holds no run, a model is damaged, or another model has the same place.
    """
    to = to.absolute()
    index = {model.folder: model for model in read_index(to)}
    for directory in run_directories:
        directory = directory.absolute()
        require_run(directory)
        for source, name in RunDirectory(directory).models():
            if not (source / MANIFEST).is_file():
                continue  # a manifest is written last: not complete
            folder = str(Path(*directory.parts[-3:], source.name))
            earlier = index.get(folder)
            if earlier is not None and earlier.run != str(directory):
                raise UserError(f"{directory}: {to / folder} came from {earlier.run}, another run of the same name")
            index[folder] = collected(folder, directory, source, name)
            bring(source, to / folder)
            with as_user_error(to):
                write_json(to / INDEX, [asdict(index[folder]) for folder in sorted(index)])
    return [index[folder] for folder in sorted(index)]


def collected(folder: str, directory: Path, source: Path, name: ModelName) -> Collected:
    size = sum(entry["size"] for entry in manifest_of(source).values())
    return Collected(folder, str(directory), name.step, name.loss, name.rougel, size, sha256(source / MANIFEST))


def bring(source: Path, target: Path) -> None:
    """Copy a model unless it is there; the files of an earlier attempt that are whole are not copied again."""
    files = manifest_of(source)
    if target.is_dir() and manifest_of(target) == files and all(sized(target / name, files[name]) for name in files):
        return
    partial = beside(target, "partial")
    with as_user_error(partial):
        for name, expected in files.items():
            copy = partial / name
            if copy.is_file() and damage(copy, expected) is None:
                continue
            copy_verified(source / name, copy, expected)
        publish(partial, target, files)


def sized(file: Path, expected: dict[str, Any]) -> bool:
    return file.is_file() and file.stat().st_size == expected["size"]


def manifest_of(folder: Path) -> dict[str, dict[str, Any]]:
    try:
        return read_manifest(folder)
    except ValueError as error:
        raise UserError(f"{folder}: {error}") from None


def read_index(to: Path) -> list[Collected]:
    file = to / INDEX
    if not file.is_file():
        return []
    try:
        return cattrs.structure(json.loads(file.read_bytes()), list[Collected])
    except (cattrs.BaseValidationError, ValueError, TypeError, RecursionError):
        raise UserError(f"{file}: not an index that `dskd collect` wrote") from None
