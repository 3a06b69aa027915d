"""The folder of a cache: its name says what decides the states in it, and cache.json spells that out."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dskd.config.errors import UserError
from dskd.config.models import TeacherConfig
from dskd.config.run import RunConfig
from dskd.data.shard import Shard
from dskd.engine.distributed import Ranks
from dskd.rundir.files import as_user_error, read_json, sha256, write_json
from dskd.rundir.lock import locked

FORMAT = 1
STATE = "last hidden state after the final norm"
About = dict[str, Any]
"""What decides the states of a cache, as cache.json holds it."""


@dataclass(frozen=True)
class CacheFolder:
    path: Path

    @classmethod
    def of(cls, run: RunConfig, about: About) -> "CacheFolder":
        key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
        return cls(run.cache_folder / f"teacher-{key[:16]}")

    @property
    def about(self) -> Path:
        return self.path / "cache.json"

    @property
    def ends(self) -> Path:
        return self.path / "ends.safetensors"

    def pieces(self) -> list[Path]:
        return sorted(self.path.glob("states-*.safetensors"))

    def piece(self, shard: Shard, content: str) -> Path:
        return self.path / f"states-{shard.name}-{content}.safetensors"

    def unfinished(self, shard: Shard) -> Iterator[Path]:
        """What a killed task left half written. Shard 0 writes the ends as well."""
        yield from self.path.glob(f".states-{shard.name}-*")
        if shard.index == 0:
            yield from self.path.glob(f".{self.ends.name}.*")

    def held(self, shard: Shard, tell: Callable[[str], None]) -> AbstractContextManager[None]:
        """Inside, no other task writes this shard. Raises `UserError` where one does."""
        what = f"{shard} of {self.path}"
        return locked(self.path / ".locks" / shard.name, "--shard", what, tell)


def described(run: RunConfig, teacher: TeacherConfig, ranks: Ranks) -> About:
    """What the main rank finds, on every rank. Collective."""

    def find() -> About | None:
        with as_user_error(run.cache_folder, "data.cache_dir"):
            return describe(run, teacher, ranks.flags.moved) if ranks.is_main else None

    about: About = ranks.together(find)[0]
    return about


def describe(run: RunConfig, teacher: TeacherConfig, moved: Callable[[], None]) -> About:
    """All that decides the hidden states of a record's token ids.

    Which records there are and how they are tokenized is not in it: a record is found by its token ids. `moved` is
    called after each file.
    """
    memory = run.cache_folder / "sums.json"
    base, adapter = sorted(teacher.path.glob("*.safetensors")), None
    code = sorted(teacher.path.glob("*.py")) if teacher.trust_remote_code else []
    if teacher.adapter is not None:
        files = [teacher.adapter / "adapter_config.json", *sorted(teacher.adapter.glob("*.safetensors"))]
        adapter = sums(files, memory, moved)
    quantized = {} if teacher.quantize == "none" else {"quantize": teacher.quantize}  # older caches do not name it
    return {
        "format": FORMAT,
        "state": STATE,
        "teacher": sums([teacher.path / "config.json", *base, *code], memory, moved),
        "adapter": adapter,
        "precision": run.engine.precision,
        "cache_precision": teacher.cache_precision,
        **quantized,
    }


def sums(files: list[Path], memory: Path, moved: Callable[[], None]) -> dict[str, str]:
    """The sha256 of each file by its name; one that has not changed since `memory` was written is not read again."""
    known: dict[str, Any] = {}
    with suppress(UserError):  # a memory that is damaged is made anew
        known = read_json(memory) or {}
    found = {}
    for file in files:
        place, about = str(file.absolute()), file.stat()
        stamp = {"size": about.st_size, "modified_ns": about.st_mtime_ns}
        if known.get(place) is None or not stamp.items() <= known[place].items():
            known[place] = stamp | {"sha256": sha256(file)}
            memory.parent.mkdir(parents=True, exist_ok=True)
            write_json(memory, known)
        found[file.name] = known[place]["sha256"]
        moved()
    return found


def differences(about: Mapping[str, Any], other: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What differs between two caches' ingredients, "key: there -> here"; of sums the names of the files alone."""
    found = []
    for key in sorted({**about, **other}):
        here, there = about.get(key), other.get(key)
        if isinstance(here, Mapping) and isinstance(there, Mapping):
            found += differences(here, there, f"{prefix}{key}: ")
        elif here != there:
            plain = prefix or isinstance(here, Mapping) or isinstance(there, Mapping)
            found.append(f"{prefix}{key}" if plain else f"{key}: {there} -> {here}")
    return found


def nearest_difference(run: RunConfig, about: About) -> str:
    """What keeps the most alike cache beside from being the one of this run; empty where there is no other."""
    others = []
    for file in sorted(run.cache_folder.glob("teacher-*/cache.json")):
        if not CacheFolder(file.parent).ends.is_file():
            continue  # a task was refused, or killed, before there was anything in it
        with suppress(UserError):
            others.append((differences(about, read_json(file) or {}), file.parent.name))
    if not others:
        return ""
    changes, name = min(others, key=lambda other: len(other[0]))
    return f"{name} has another {', '.join(changes)}"
