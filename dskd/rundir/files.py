"""Files and folders that are whole or not there, and how to tell: manifests with sizes and sha256. Torch-free."""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from io import FileIO
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from uuid import uuid4

import stamina
from stamina.instrumentation import set_on_retry_hooks

from dskd.config.errors import UserError
from dskd.rundir.layout import MANIFEST, beside

UMASK = os.umask(0o077)
os.umask(UMASK)  # it can only be read by setting it
T = TypeVar("T")
PASSING = {
    *(errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EBUSY, errno.EINTR),
    *(errno.ENOSPC, errno.EDQUOT, errno.EREMOTEIO, errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN),
}
set_on_retry_hooks([])  # what comes of a retry is told once, at the end
Manifest = Mapping[str, Mapping[str, Any]]
"""Size in bytes and sha256 of each file of a folder, by its name relative to the folder."""
Contents = Mapping[str, Iterable[bytes | memoryview]]
"""What is to be in each file of a folder, in pieces, by its name; each iteration over a content gives it again."""
BLOCK = 2**24
"""Bytes that are hashed and written at a time."""


@contextmanager
def as_user_error(path: Path, key: str = "output.root") -> Iterator[None]:
    """What the system refuses is said in one line; any other error stays what it is."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        number = error_number(error)
        if number is None:
            raise
        where = getattr(error, "filename", None) or path
        raise UserError(f"{key}: cannot write {where}: {os.strerror(number)}") from None


def error_number(error: Exception) -> int | None:
    """The system's number of an error. Libraries in Rust tell it only in their message: "... (os error 28)"."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"os error (\d+)", str(error))
    return int(found.group(1)) if found else None


def may_pass(error: Exception) -> bool:
    """Whether a failure is of a kind that storage which many share recovers from."""
    return error_number(error) in PASSING


def persistently(do: Callable[[], T]) -> T:
    """`do`, which must bear to be done twice; tried again for some seconds where what failed may pass."""
    waits = {"wait_initial": 0.3, "wait_max": 2.0, "wait_jitter": 0.0}  # no jitter: it would draw from `random`
    for attempt in stamina.retry_context(on=may_pass, attempts=4, timeout=None, **waits):
        with attempt:
            return do()
    raise AssertionError("not reached: the last attempt raises")


def read_json(file: Path) -> dict[str, Any] | None:
    """The object in a file, None where there is no file. Raises `UserError` where it holds something else."""
    try:
        found = json.loads(file.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{file}: is damaged: no JSON object")
    return found


def read_json_lines(file: Path, last_bytes: int | None = None) -> Iterator[dict[str, Any]]:
    """The objects on the whole lines of a file that may be missing, or be written to at this moment.

    With `last_bytes`, those of its end alone.
    """
    try:
        with file.open("rb") as data:
            if last_bytes is not None:
                data.seek(max(0, os.fstat(data.fileno()).st_size - last_bytes))
            lines = data.read().splitlines()
    except FileNotFoundError:
        return
    for line in lines:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            yield value


@contextmanager
def written(file: Path) -> Iterator[Path]:
    """A temporary path to write to; afterwards it is synced and takes the name `file`, in the place of what had it.

    Whenever the machine stops, `file` is the old one or the whole new one.
    """
    temporary = beside(file, uuid4().hex[:12])
    try:
        yield temporary
        sync_file(temporary)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(file: Path, text: str, mode: int | None = None) -> None:
    """Write a whole file or none, with the permissions `mode`, or those that the process gives to every file."""

    def write() -> None:
        with written(file) as temporary:
            temporary.touch(mode or 0o666, exist_ok=False)
            temporary.write_text(text, encoding="utf-8")

    persistently(write)


def write_json(file: Path, value: object) -> None:
    write_text(file, json.dumps(value, indent=2) + "\n")


def append_json(file: Path, value: object) -> None:
    """Add one line to a file."""
    with file.open("ab", buffering=0) as out:
        write_all(out, (json.dumps(value) + "\n").encode())


def write_all(out: FileIO, data: bytes | memoryview) -> None:
    """Write to a file without a buffer; one write may take only a part."""
    rest = memoryview(data)
    while rest:
        rest = rest[persistently(partial(out.write, rest)) or 0 :]


def write_files(folder: Path, files: Contents) -> dict[str, dict[str, int | str]]:
    """Write files into a folder, down to the disk; their sizes and sums, found on the way."""
    found = {}
    for name, content in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        found[name] = write_hashed(file, content)
    return found


def write_hashed(file: Path, content: Iterable[bytes | memoryview]) -> dict[str, int | str]:
    """Write one file, down to the disk; its size and sha256. Nothing of it stays where that fails."""
    size, hashed = 0, hashlib.sha256()
    try:
        with file.open("wb", buffering=0) as out:
            for piece in content:
                whole = memoryview(piece)
                for start in range(0, len(whole), BLOCK):
                    block = whole[start : start + BLOCK]
                    hashed.update(block)
                    write_all(out, block)
                size += len(whole)
            os.fsync(out.fileno())
    except BaseException:
        with suppress(OSError):
            file.unlink()
        raise
    return {"size": size, "sha256": hashed.hexdigest()}


def private_folder(folder: Path) -> None:
    """Make a folder that its owner alone can read and write; its parents are as usual."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    folder.chmod(0o700)


def refuse_filled(folder: Path) -> None:
    """Raise `UserError` where a folder that is to be made is there and holds something."""
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder}: is there already, and nothing is written over; name a new folder")


@contextmanager
def published(folder: Path) -> Iterator[Path]:
    """A temporary folder to fill; afterwards it gets a MANIFEST.json, is synced, and takes the name `folder`.

    If anything fails on the way nothing of it stays.
    """
    temporary = beside(folder, uuid4().hex[:12])
    try:
        temporary.mkdir(parents=True)
        yield temporary
        publish(temporary, folder, manifest(temporary))
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def publish(temporary: Path, folder: Path, files: Manifest) -> None:
    """Give a filled folder its manifest and its final name, in the place of what had that name."""
    write_json(temporary / MANIFEST, files)
    for name in files:
        (temporary / name).chmod(0o666 & ~UMASK)  # libraries that write files themselves may hide them from the group
    persistently(lambda: sync(temporary))
    if folder.exists():  # left by a run that was killed before its state knew of it
        replaced = beside(folder, "replaced")
        shutil.rmtree(replaced, ignore_errors=True)
        persistently(lambda: folder.rename(replaced))
        persistently(lambda: temporary.rename(folder))
        shutil.rmtree(replaced)
    else:
        persistently(lambda: temporary.rename(folder))
    persistently(lambda: sync(folder.parent, recurse=False))


def manifest(folder: Path) -> dict[str, dict[str, int | str]]:
    """Size in bytes and sha256 of every file in `folder`."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != MANIFEST)
    return {str(f.relative_to(folder)): entry(f) for f in files}


def entry(file: Path) -> dict[str, int | str]:
    return {"size": file.stat().st_size, "sha256": sha256(file)}


def read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """Raises `ValueError` where there is none, it is not one, or it names anything outside of its folder."""
    try:
        found = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{MANIFEST} cannot be read: {error}") from None
    if not isinstance(found, dict) or not all(
        isinstance(e, dict) and isinstance(e.get("size"), int) and isinstance(e.get("sha256"), str)
        for e in found.values()
    ):
        raise ValueError(f"{MANIFEST} does not list files with size and sha256")
    for name in found:
        if not stays_inside(name):
            raise ValueError(f"{MANIFEST} names {name!r}, which is no file of its folder")
    return found


def stays_inside(name: str) -> bool:
    """Whether a file's name, from a file that others may have written, lies below the folder that it is joined to."""
    path = PurePosixPath(name)
    plain = name.isprintable() and str(path) == name and name != "."
    return plain and not path.is_absolute() and ".." not in path.parts


def damage(file: Path, expected: Mapping[str, Any]) -> str | None:
    """What is wrong with a file that its manifest describes; None where nothing is."""
    try:
        size = file.stat().st_size
        if size != expected["size"]:
            return f"{file.name} has {size} bytes and not {expected['size']}"
        return None if sha256(file) == expected["sha256"] else f"{file.name} has another sha256 than its manifest says"
    except OSError as error:
        return f"{file.name} cannot be read: {error.strerror}"


def copy_verified(source: Path, target: Path, expected: Mapping[str, Any]) -> None:
    """Copy a file to another disk. Raises `UserError` where it does not arrive as its manifest describes it."""

    def copy() -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
        sync_file(target)

    persistently(copy)
    problem = damage(target, expected)
    if problem is not None:
        raise UserError(f"{target}: not what it should be as a copy of {source}: {problem}")


def sha256(file: Path) -> str:
    with file.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


def sync(folder: Path, recurse: bool = True) -> None:
    """Make what was written to `folder` survive a power cut."""
    for path in (*(folder.rglob("*") if recurse else ()), folder):
        sync_file(path)


def sync_file(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
