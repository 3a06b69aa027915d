"""Staging: states and models are written to a node's own disk, and copied to the run directory in the background."""

import hashlib
import os
import shutil
import stat
from collections.abc import Callable
from concurrent import futures
from contextlib import suppress
from pathlib import Path
from typing import Any

from dskd.config.errors import UserError
from dskd.rundir.files import as_user_error, copy_verified, publish, read_manifest
from dskd.rundir.layout import beside


class Staging:
    """This rank's copies, one after the other in a thread. Without a scratch folder all is written in its place."""

    def __init__(self, scratch: Path | None, directory: Path, rank: int) -> None:
        self.directory = directory
        self.scratch = None if scratch is None else own_folder(scratch, directory, rank)
        self.copies: list[futures.Future[None]] = []
        if scratch is not None:
            self.thread = futures.ThreadPoolExecutor(1, "staging")

    def local(self, path: Path) -> Path:
        """Where to write what is to become `path` in the run directory."""
        return path if self.scratch is None else self.scratch / path.relative_to(self.directory)

    def file(self, path: Path, expected: dict[str, Any]) -> None:
        """Bring a file that was written to `local(path)`; `expected` are its size and sha256."""
        self.submit(lambda: move_file(self.local(path), path, expected))

    def folder(self, path: Path) -> None:
        """Bring a folder with a manifest that was written to `local(path)`: whole or not at all."""
        self.submit(lambda: move_folder(self.local(path), path))

    def submit(self, copy: Callable[[], None]) -> None:
        if self.scratch is not None:
            self.copies.append(self.thread.submit(copy))

    @property
    def busy(self) -> bool:
        return any(not copy.done() for copy in self.copies)

    def wait(self) -> None:
        """Until all has arrived. Raises what a copy raised."""
        copies, self.copies = self.copies, []
        for copy in copies:
            copy.result()


def own_folder(scratch: Path, directory: Path, rank: int) -> Path:
    """An empty folder of this rank on a disk that others use as well, which no one else can read or has prepared.

    Raises `UserError` where something of someone else's is in its place.
    """
    name = hashlib.sha256(str(directory).encode()).hexdigest()[:16]  # runs and ranks that share a node share its disk
    folder = scratch / f"dskd-{os.getuid()}-{name}"
    with as_user_error(folder, "checkpoint.scratch_dir"):
        scratch.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        about = folder.lstat()  # of a link itself, and not of what it points to
        if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.getuid():
            raise UserError(f"checkpoint.scratch_dir: {folder} is a link, or another user's; it is not touched")
        folder.chmod(0o700)
        own = folder / f"rank{rank}"
        if own.is_dir() and not own.is_symlink():
            shutil.rmtree(own)  # an earlier start's; what counts is in the run directory
        own.mkdir()
    return own


def move_file(source: Path, target: Path, expected: dict[str, Any]) -> None:
    with as_user_error(target):
        copy_verified(source, target, expected)
        source.unlink()


def move_folder(source: Path, target: Path) -> None:
    files, temporary = read_manifest(source), beside(target, "copy")
    with as_user_error(temporary):
        for name, expected in files.items():
            move_file(source / name, temporary / name, expected)
        publish(temporary, target, files)
        shutil.rmtree(source)
