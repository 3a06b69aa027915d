"""What a run or an evaluation reads and writes, as mounts of a container, most of them at the same path inside."""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from dskd.config.errors import UserError, require
from dskd.config.load import is_plain
from dskd.config.run import RunConfig, models_of, written_folders
from dskd.rundir.files import read_json

ADAPTER = "adapter_config.json"
MOST_LINKS = 40
"""Links that one after the other lead to a file; a system follows no more."""


@dataclass(frozen=True, order=True)
class Mount:
    target: Path
    """Where it lies in the container."""
    source: Path
    """Where it lies outside."""
    writable: bool = False

    def __post_init__(self) -> None:
        for path in map(str, (self.source, self.target)):
            require("," not in path, path, "a path with a comma cannot be mounted")
            require(all(map(is_plain, path)), path, "a path with line breaks or control characters cannot be mounted")
            require(path != "/", path, "the root folder cannot be mounted")

    @classmethod
    def of(cls, path: Path, writable: bool = False) -> Self:
        """A path that is the same inside."""
        return cls(path, path, writable)

    @classmethod
    def parse(cls, text: str) -> Self:
        """What a cluster profile names: /path, or /host:/inside[:ro]."""
        source, *rest = text.split(":")
        return cls(Path((rest or [source])[0]), Path(source), rest[1:] != ["ro"])

    @property
    def flag(self) -> str:
        """As docker and podman take it, which make no missing folder of it."""
        return f"type=bind,source={self.source},target={self.target}" + ("" if self.writable else ",readonly")

    @property
    def short(self) -> str:
        """As apptainer and pyxis take it."""
        for path in map(str, (self.source, self.target)):
            require(":" not in path, path, "a path with a colon cannot be mounted by this container runtime")
        return f"{self.source}:{self.target}" + ("" if self.writable else ":ro")

    def holds(self, other: "Mount") -> bool:
        """Whether another mount lies inside of this one."""
        return self.target != other.target and other.target.is_relative_to(self.target)


def run_mounts(run: RunConfig) -> list[Mount]:
    """What a training needs: its records, models with all that they link to, and the folders that it writes to."""
    return [
        *map(Mount.of, (run.data.train, run.data.dev)),
        *(mount for model in models_of(run) for mount in model_mounts(model)),
        *(Mount.of(folder, writable=True) for folder in written_folders(run)),
    ]


def evaluation_mounts(model: Path, data: Iterable[Path], output: Path, base: Path | None) -> list[Mount]:
    """What an evaluation needs; `base` is the model that an adapter belongs to."""
    models = [model, *([base] if base else [])]
    return [
        *(mount for path in models for mount in model_mounts(path)),
        *map(Mount.of, data),
        Mount.of(output, writable=True),
    ]


def model_mounts(folder: Path) -> Iterator[Mount]:
    """A model's folder, and the folders that its files are links into: a download keeps its weights in one beside."""
    yield Mount.of(folder)
    for file in folder.rglob("*"):
        inside, outside = file, file
        for _ in range(MOST_LINKS):
            if not outside.is_symlink():
                break
            link = outside.readlink()
            # Inside, the way to the folder has no links of its own: what leads out of it leads to another place there.
            inside, outside = Path(os.path.normpath(inside.parent / link)), outside.parent / link
            outside = outside.parent.resolve() / outside.name
            if outside.exists() and not inside.is_relative_to(folder):
                yield Mount(inside.parent, outside.parent)


def base_of(model: Path) -> Path | None:
    """The model that an adapter belongs to; None for a whole model. Raises `UserError` where it is not there."""
    values = read_json(model / ADAPTER)
    if values is None:
        return None
    base = values.get("base_model_name_or_path")
    if not isinstance(base, str) or not Path(base).is_dir():
        raise UserError(f"{model / ADAPTER}: the adapter's base model is not at {base}")
    return Path(base).absolute()


def needed(own: Iterable[Mount], given: Sequence[Mount] = ()) -> list[Mount]:
    """The mounts of a profile, and those of a run that no other mount shows already; outer ones first."""
    wanted: dict[Path, Mount] = {}
    for mount in sorted(own, key=lambda mount: mount.writable):  # of two at one place the writable one counts
        wanted[mount.target] = mount
    taken = {mount.target for mount in given}
    kept = [
        mount
        for mount in wanted.values()
        if mount.target not in taken
        and not any(outer.holds(mount) and (outer.writable or not mount.writable) for outer in given)
        and not any(shows_the_same(outer, mount) for outer in wanted.values())
    ]
    return sorted([*given, *kept])


def shows_the_same(outer: Mount, mount: Mount) -> bool:
    """Whether what `mount` shows can be seen through `outer` too, with the same rights."""
    if not outer.holds(mount) or outer.writable != mount.writable:
        return False
    return outer.source / mount.target.relative_to(outer.target) == mount.source
