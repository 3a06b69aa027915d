"""What a run reads, told by its content: sums of its records and of its models' files, as args.json keeps them.

A file of up to 64 MiB is read whole: configurations, tokenizers, MANIFEST.json with the sums of what dskd saved. Of a
larger file of a model its size and 16 samples count, of 256 KiB each and the same at every start, so that a teacher of
145 GB takes seconds. Records are read whole.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import cattrs

from dskd.config.errors import UserError
from dskd.config.run import RunConfig, models_by_key
from dskd.rundir.files import read_json, sha256
from dskd.rundir.layout import RunDirectory

WHOLE = 2**26
"""Bytes of a model's file up to which all of it counts."""
SAMPLES, SAMPLE_BYTES = 16, 2**18
SUFFIXES = (".json", ".safetensors", ".model", ".txt", ".jinja", ".py")
"""Of the files of a model's folder that may make it another model, or its tokenizer another one."""
RECORDS = "records"


@dataclass(frozen=True)
class Content:
    path: str
    """The file or folder, with all links followed."""
    files: dict[str, str]
    """The sum of each file, by its name."""


def contents(run: RunConfig) -> dict[str, Content]:
    """What the run reads, by the key of the run file. Raises `UserError` for what cannot be read."""
    records = {"data.train": run.data.train, "data.dev": run.data.dev}
    found = {key: Content(os.path.realpath(file), {RECORDS: sum_of(file)}) for key, file in records.items()}
    return found | {key: model_content(folder) for key, folder in models_by_key(run).items()}


def model_content(folder: Path) -> Content:
    """Only what lies in the folder itself: evaluations of a model lie in folders below."""
    files = sorted(file for file in folder.glob("*") if file.suffix in SUFFIXES and file.is_file())
    return Content(os.path.realpath(folder), {file.name: sum_of(file, WHOLE) for file in files})


def sum_of(file: Path, whole: int | None = None) -> str:
    """The sum of a file; of one of more than `whole` bytes, of its size and of samples."""
    try:
        about = file.stat()
        return sum_at(file, about.st_mtime_ns, about.st_size, whole is not None and about.st_size > whole)
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None


@lru_cache(maxsize=1024)
def sum_at(file: Path, changed: int, size: int, sampled: bool) -> str:
    """`changed`: its time in nanoseconds, so that a file that is asked for again is read once."""
    if not sampled:
        return sha256(file)
    found = hashlib.sha256(str(size).encode())
    with file.open("rb") as data:
        for index in range(SAMPLES):
            data.seek(index * (size - SAMPLE_BYTES) // (SAMPLES - 1))
            found.update(data.read(SAMPLE_BYTES))
    return found.hexdigest()


def as_kept(found: Mapping[str, Content]) -> dict[str, Any]:
    """What args.json holds: the contents by key, and a sum of them all, so that damage is not taken for a change."""
    by_key = {key: asdict(content) for key, content in found.items()}
    return {"by_key": by_key, "sum": sum_of_text(json.dumps(by_key, sort_keys=True))}


def sum_of_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def read_contents(directory: RunDirectory) -> dict[str, Content]:
    """What the run read at its last start; nothing where args.json is damaged, or older than this was kept."""
    try:
        kept = (read_json(directory.args) or {})["content"]
        found = cattrs.structure(kept["by_key"], dict[str, Content])
        return found if as_kept(found) == kept else {}
    except (UserError, cattrs.BaseValidationError, TypeError, ValueError, AttributeError, KeyError):
        return {}


def differences(before: Mapping[str, Content], now: Mapping[str, Content]) -> dict[str, str | None]:
    """For each key that both have: what differs, in words, or None where the content is the same."""
    return {key: difference(before[key], content) for key, content in now.items() if key in before}


def difference(before: Content, now: Content) -> str | None:
    names = [name for name in sorted({**before.files, **now.files}) if before.files.get(name) != now.files.get(name)]
    if not names:
        return None
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    led = "" if before.path == now.path else f" ({before.path} at the last start)"
    return f"another content since the last start in {now.path}{led}: {', '.join(names[:3])}{more}"
