"""Files and folders that are whole or not there, and how to tell: manifests with sizes and sha256. Torch-free."""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dskd.config.errors import UserError

MANIFEST = "MANIFEST.json"
MODEL_NAME = re.compile(r"epoch\d+_step(\d+)_loss([\d.]+?)(?:_rougel([\d.]+))?")
"""Name of a saved model's folder, which tells its step and scores."""
Manifest = Mapping[str, Mapping[str, Any]]


@contextmanager
def as_user_error(path: Path) -> Iterator[None]:
    """No space and no permission are said in one line; any other failure of the system stays what it is."""
    try:
        yield
    except Exception as error:
        number = error_number(error)
        if number in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
            where = getattr(error, "filename", None) or path
            raise UserError(f"output.root: cannot write {where}: {os.strerror(number)}") from None
        raise


def error_number(error: Exception) -> int | None:
    """The system's number of an error. safetensors tells it only in its message: "... (os error 28)"."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"os error (\d+)", str(error)) if type(error).__name__ == "SafetensorError" else None
    return int(found.group(1)) if found else None


def write_text(file: Path, text: str) -> None:
    """Write a file that is either the old one or the whole new one, whenever the machine stops."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    temporary.replace(file)


@contextmanager
def published(folder: Path) -> Iterator[Path]:
    """A temporary folder to fill; afterwards it gets a MANIFEST.json, is synced, and takes the name `folder`.

    If anything fails on the way nothing of it stays.
    """
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        with as_user_error(temporary):
            temporary.mkdir(parents=True)
            yield temporary
            publish(temporary, folder, manifest(temporary))
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def publish(temporary: Path, folder: Path, files: Manifest) -> None:
    """Give a filled folder its manifest and its final name, in the place of what had that name."""
    write_text(temporary / MANIFEST, json.dumps(files, indent=2) + "\n")
    sync(temporary)
    if folder.exists():  # left by a run that was killed before its state knew of it
        replaced = folder.with_name(f".{folder.name}.replaced")
        shutil.rmtree(replaced, ignore_errors=True)
        folder.rename(replaced)
        temporary.rename(folder)
        shutil.rmtree(replaced)
    else:
        temporary.rename(folder)
    sync(folder.parent, recurse=False)


def manifest(folder: Path) -> dict[str, dict[str, int | str]]:
    """Size in bytes and sha256 of every file in `folder`."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != MANIFEST)
    return {str(f.relative_to(folder)): entry(f) for f in files}


def entry(file: Path) -> dict[str, int | str]:
    return {"size": file.stat().st_size, "sha256": sha256(file)}


def read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """Raises `ValueError` where there is none, or it is not one."""
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{MANIFEST} cannot be read: {error}") from None
    if not isinstance(found, dict) or not all(
        isinstance(e, dict) and {"size", "sha256"} <= set(e) for e in found.values()
    ):
        raise ValueError(f"{MANIFEST} does not list files with size and sha256")
    return found


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
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    sync_file(target)
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
