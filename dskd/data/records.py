"""Records: jsonl files of {"prompt": text, "output": text or list of texts}, read when asked for. Torch-free."""

import codecs
import json
import os
import stat
import weakref
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any, overload

from dskd.config.errors import UserError, one_line
from dskd.rundir.files import persistently

LOOKED_AT = 1000
"""Lines of a file that are checked before anything else begins."""
LONGEST_LINE = 2**26
"""Bytes; a file without line breaks is no jsonl file, and would be read whole."""
Stamp = tuple[int, int]
"""Size and time of a file: what tells that it was changed."""


@dataclass(frozen=True)
class Record:
    prompt: str
    """What the model is given, in its final form (template included)."""
    outputs: tuple[str, ...]
    """Acceptable answers; training uses the first, evaluation the best match."""


class Records(Sequence[Record]):
    """The records of a file. In memory are only where each begins and its length; a million take 12 MB.

    Forked processes read through the same open file, each at its own place; a pickled copy opens the file anew. A
    failure of the storage that may pass is waited for. Raises `UserError` where the file was changed in the meantime.
    """

    def __init__(self, file: Path, stamp: Stamp, offsets: "array[int]", sizes: "array[int]") -> None:
        self.file, self.stamp, self.offsets = file, stamp, offsets
        self.sizes = sizes
        """Characters of each record's prompt and first output."""
        with told(file):
            self.handle = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self.handle)

    def __reduce__(self) -> tuple[Any, ...]:
        return Records, (self.file, self.stamp, self.offsets, self.sizes)

    def __len__(self) -> int:
        return len(self.sizes)

    @overload
    def __getitem__(self, index: int) -> Record: ...

    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...

    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        place = range(len(self))[index]
        return [self.read(i) for i in place] if isinstance(place, range) else self.read(place)

    def read(self, index: int) -> Record:
        start, end = self.offsets[index : index + 2]
        with told(self.file):
            line = persistently(partial(os.pread, self.handle, end - start, start))
            if stamp_of(self.handle) != self.stamp:
                raise UserError(f"{self.file}: was changed while it was in use; it must stay as it is until the end")
        return parse_record(line, f"{self.file}: record {index}")


def read_records(file: Path) -> Records:
    """The records of a jsonl file; record i stands on line i + 1 of those that are not blank.

    Raises:
        UserError: naming file and line, for JSON that does not parse, a missing field, an empty answer, an empty file.
    """
    offsets, sizes = array("q"), array("i")
    with told(file), opened(file) as lines:
        stamp = stamp_of(lines.fileno())
        for offset, record in numbered(lines, file):
            offsets.append(offset)
            sizes.append(len(record.prompt) + len(record.outputs[0]))
    offsets.append(stamp[0])
    if not sizes:
        raise UserError(f"{file}: is empty; at least one record is expected")
    return Records(file, stamp, offsets, sizes)


def check_records(file: Path) -> None:
    """Raise `UserError` for a mistake in the first lines of a file, as `read_records` would."""
    with told(file), opened(file) as lines:
        found = sum(1 for _ in numbered(lines, file, LOOKED_AT))
        if not found and not lines.read(1):
            raise UserError(f"{file}: is empty; at least one record is expected")


def opened(file: Path) -> IO[bytes]:
    mode = file.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # a pipe can be read once, and from its beginning
        raise UserError(f"{file}: is no plain file; one is expected")
    return file.open("rb")


@contextmanager
def told(file: Path) -> Iterator[None]:
    """Inside, what the system says about a file is a `UserError`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None


def stamp_of(handle: int) -> Stamp:
    about = os.fstat(handle)
    return about.st_size, about.st_mtime_ns


def numbered(lines: IO[bytes], file: Path, most: int | None = None) -> Iterator[tuple[int, Record]]:
    """Where each record begins, and the record; of the first `most` lines alone where that is given."""
    offset = 0
    for number, line in enumerate(islice(iter(partial(lines.readline, LONGEST_LINE + 1), b""), most), start=1):
        if line.strip():
            yield offset, parse_record(line, f"{file}:{number}")
        offset += len(line)


def json_line(record: Record) -> str:
    """A record as a line of a file."""
    output = record.outputs[0] if len(record.outputs) == 1 else list(record.outputs)
    return json.dumps({"prompt": record.prompt, "output": output}, ensure_ascii=False) + "\n"


def objects(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects on the lines of a file, each with where it stands."""
    with told(file), opened(file) as lines:
        for number, line in enumerate(iter(partial(lines.readline, LONGEST_LINE + 1), b""), start=1):
            if line.strip():
                yield f"{file}:{number}", parse_object(line, f"{file}:{number}")


def parse_record(line: bytes, where: str) -> Record:
    """One line of a jsonl file; `where` names it in errors."""
    return record_of(parse_object(line, where), where)


def parse_object(line: bytes, where: str) -> dict[str, Any]:
    """The JSON object on a line."""
    if len(line) > LONGEST_LINE:
        raise UserError(f"{where}: is longer than {LONGEST_LINE} bytes; one record a line is expected")
    try:
        value = json.loads(line.removeprefix(codecs.BOM_UTF8).decode().rstrip())
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: is not UTF-8 text ({error.reason} at byte {error.start} of the line)") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: broken JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets in thousands of others
        raise UserError(f"{where}: JSON that is not read: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f'{where}: an object {{"prompt": ..., "output": ...}} is expected')
    return value


def record_of(value: Mapping[str, Any], where: str) -> Record:
    """The record that an object stands for, whatever file it is from."""
    for field in ("prompt", "output"):
        if field not in value:
            found = one_line(", ".join(value), 100) or "nothing"
            raise UserError(f'{where}: field "{field}" is missing; found: {found}')
    if not isinstance(value["prompt"], str):
        raise UserError(f'{where}: "prompt" must be text')
    outputs = value["output"] if isinstance(value["output"], list) else [value["output"]]
    if not all(isinstance(output, str) for output in outputs):
        raise UserError(f'{where}: "output" must be text or a list of texts')
    if not outputs or not all(output.strip() for output in outputs):
        raise UserError(f'{where}: "output" is empty; a response of at least one character is expected')
    try:
        "".join((value["prompt"], *outputs)).encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: holds half a character (a lone surrogate such as \\ud83d)") from None
    return Record(value["prompt"], tuple(outputs))
