"""Staging: what is saved is written by a thread, one thing after the other, while training goes on.

With a scratch folder it is written to a node's own disk first, and copied from there to the run directory.
"""

import hashlib
import os
import shutil
import stat
from collections.abc import Callable
from concurrent import futures
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from dskd.checkpoint.host_memory import HostMemory
from dskd.config.errors import UserError
from dskd.rundir.files import Contents, Manifest, as_user_error, copy_verified, persistently, write_files

T = TypeVar("T")


class Staging:
    """The thread of this rank. It calls no collective, draws no random number, and knows neither engine nor models."""

    def __init__(self, scratch: Path | None, directory: Path, rank: int) -> None:
        self.directory = directory
        self.scratch = None if scratch is None else own_folder(scratch, directory, rank)
        self.thread = futures.ThreadPoolExecutor(1, "staging")
        self.jobs: list[futures.Future[Any]] = []

    def write(self, folder: Path, files: Contents, memory: HostMemory | None) -> "futures.Future[Manifest]":
        """Write files to `folder` in the run directory; sizes and sums, once all of them are there.

        Args:
            memory: what holds the files' tensors until they are written. Without it they are those that are trained,
                and this returns only when nothing reads them any more.
        """
        local = self.local(folder)
        written = self.submit(lambda: write_whole(local, files))
        if memory is None:
            futures.wait([written])
        else:
            memory.reader = written
        if self.scratch is None:
            return written
        return self.submit(lambda: move_files(local, folder, written.result()))

    def local(self, path: Path) -> Path:
        """Where to write what is to become `path` in the run directory."""
        return path if self.scratch is None else self.scratch / path.relative_to(self.directory)

    def submit(self, job: Callable[[], T]) -> "futures.Future[T]":
        """Do something after all that was submitted before. It raises `UserError` where it cannot write."""
        done = self.thread.submit(job)
        self.jobs.append(done)
        return done

    def busy(self, wait: bool) -> bool:
        """Whether anything is left to be done, which nothing is after waiting. Raises what a job raised."""
        while self.jobs and (wait or self.jobs[0].done()):
            self.jobs.pop(0).result()
        return bool(self.jobs)

    def close(self) -> None:
        """From now on nothing is written; what is being written at this moment is waited for."""
        self.thread.shutdown(cancel_futures=True)


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


def write_whole(folder: Path, files: Contents) -> Manifest:
    with as_user_error(folder):
        return persistently(lambda: write_files(folder, files))


def move_files(source: Path, target: Path, files: Manifest) -> Manifest:
    with as_user_error(target):
        for name, expected in files.items():
            copy_verified(source / name, target / name, expected)
            (source / name).unlink()
    return files
