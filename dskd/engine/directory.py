"""The run directory: made once, never overwritten, every folder in it whole or not there at all."""

import errno
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from dskd import __version__
from dskd.config.errors import UserError
from dskd.config.load import to_plain, to_yaml
from dskd.config.run import RunConfig

PACKAGES = ("torch", "deepspeed", "transformers", "peft", "tokenizers", "safetensors")


def create(run: RunConfig) -> Path:
    """Make the run directory and write what runs into it: run.yaml (resolved) and args.json (with versions).

    Raises:
        UserError: where it holds another run, or cannot be written.
    """
    directory = run.directory
    refuse_other_run(directory)
    with as_user_error(directory):
        directory.mkdir(parents=True, exist_ok=True)
        write_text(directory / "run.yaml", to_yaml(run))
        write_text(directory / "args.json", json.dumps(describe(run), indent=2) + "\n")
    return directory


def refuse_other_run(directory: Path) -> None:
    """Raise `UserError` where a folder holds anything but the launcher's job/."""
    if directory.is_dir() and any(path.name != "job" for path in directory.iterdir()):
        raise UserError(
            f"output.name: {directory} already holds a run, and nothing is overwritten; choose another output.name"
        )


def describe(run: RunConfig) -> dict[str, Any]:
    return {
        "run": to_plain(run),
        "command": sys.argv,
        "dskd": __version__,
        "git": git_revision(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def git_revision() -> str | None:
    """Revision of the source that runs, where it is a git checkout."""
    here = Path(__file__).parent
    with suppress(OSError):
        found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
        return found.stdout.strip() or None
    return None


@contextmanager
def as_user_error(path: Path) -> Iterator[None]:
    """No space and no permission are said in one line; any other failure of the system stays what it is."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = error.errno if isinstance(error, OSError) else os_error_in(str(error))
        if number in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
            where = getattr(error, "filename", None) or path
            raise UserError(f"output.root: cannot write {where}: {os.strerror(number)}") from None
        raise


def os_error_in(message: str) -> int | None:
    """safetensors tells the system's error only in its message: "... (os error 28)"."""
    found = re.search(r"os error (\d+)", message)
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
            write_text(temporary / "MANIFEST.json", json.dumps(manifest(temporary), indent=2) + "\n")
            sync(temporary)
            temporary.rename(folder)
            sync(folder.parent, recurse=False)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def manifest(folder: Path) -> dict[str, dict[str, int | str]]:
    """Size in bytes and sha256 of every file in `folder`."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(f.relative_to(folder)): {"size": f.stat().st_size, "sha256": sha256(f)} for f in files}


def sha256(file: Path) -> str:
    with file.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


def sync(folder: Path, recurse: bool = True) -> None:
    """Make what was written to `folder` survive a power cut."""
    for path in (*(folder.rglob("*") if recurse else ()), folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
