"""Saved models of many runs in one place: copied, verified, and listed in index.json. Torch-free."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dskd.config.errors import UserError
from dskd.engine.files import (
    MANIFEST,
    MODEL_NAME,
    as_user_error,
    copy_verified,
    damage,
    publish,
    read_manifest,
    sha256,
    write_text,
)

INDEX = "index.json"


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
        if not (directory / "run.yaml").is_file():
            raise UserError(f"{directory}: no run.yaml: a run directory is expected, as `dskd train` writes it")
        for source in saved_models(directory):
            folder = str(Path(*directory.parts[-3:], source.name))
            earlier = index.get(folder)
            if earlier is not None and earlier.run != str(directory):
                raise UserError(f"{directory}: {to / folder} came from {earlier.run}, another run of the same name")
            index[folder] = describe(folder, directory, source)
            bring(source, to / folder)
            with as_user_error(to):
                values = [asdict(index[name]) for name in sorted(index)]
                write_text(to / INDEX, json.dumps(values, indent=2) + "\n")
    return [index[name] for name in sorted(index)]


def saved_models(directory: Path) -> Iterator[Path]:
    """Complete models only: a manifest is written last."""
    for folder in sorted(directory.glob("epoch*")):
        if MODEL_NAME.fullmatch(folder.name) and (folder / MANIFEST).is_file():
            yield folder


def describe(folder: str, directory: Path, source: Path) -> Collected:
    named = MODEL_NAME.fullmatch(source.name)
    assert named is not None
    size = sum(entry["size"] for entry in manifest_of(source).values())
    rougel = None if named[3] is None else float(named[3])
    return Collected(folder, str(directory), int(named[1]), float(named[2]), rougel, size, sha256(source / MANIFEST))


def bring(source: Path, target: Path) -> None:
    """Copy a model unless it is there; the files of an earlier attempt that are whole are not copied again."""
    files = manifest_of(source)
    if target.is_dir() and manifest_of(target) == files and all(sized(target / name, files[name]) for name in files):
        return
    partial = target.with_name(f".{target.name}.partial")
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
        return [Collected(**values) for values in json.loads(file.read_text(encoding="utf-8"))]
    except (ValueError, TypeError):
        raise UserError(f"{file}: not an index that `dskd collect` wrote") from None
