"""Staging: states and models are written to a node's own disk, and copied to the run directory in the background."""

import hashlib
import shutil
from collections.abc import Callable
from concurrent import futures
from pathlib import Path
from typing import Any

from dskd.rundir.files import as_user_error, copy_verified, publish, read_manifest
from dskd.rundir.layout import beside


class Staging:
    """This rank's copies, one after the other in a thread. Without a scratch folder all is written in its place."""

    def __init__(self, scratch: Path | None, directory: Path, rank: int) -> None:
        self.directory, self.scratch = directory, None
        self.copies: list[futures.Future[None]] = []
        if scratch is not None:
            # Runs and ranks that share a node share its disk.
            name = hashlib.sha256(str(directory).encode()).hexdigest()[:16]
            self.scratch = scratch / f"dskd-{name}" / f"rank{rank}"
            shutil.rmtree(self.scratch, ignore_errors=True)  # an earlier start's; what counts is in the run directory
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

    def wait(self, moved: Callable[[], None]) -> None:
        """Until all has arrived; `moved` is called every second. Raises what a copy raised."""
        copies, self.copies = self.copies, []
        while futures.wait(copies, timeout=1.0).not_done:
            moved()
        for copy in copies:
            copy.result()


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
