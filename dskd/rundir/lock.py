"""One process group at a time in a run directory.

A POSIX record lock (`fcntl.lockf`) on .lock/lock: it belongs to the process, children do not inherit it, the kernel
drops it however the process ends, and NFS and Lustre pass it on between machines where they are set up to. Where they
are not, the beats of the holder in .lock/holder tell that it lives: a counter, so that no clocks are compared.
"""

import errno
import fcntl
import json
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from dskd.config.errors import UserError
from dskd.rundir.files import as_user_error, write_text
from dskd.rundir.layout import RunDirectory

BEAT_SECONDS = 10.0
DEAD_SECONDS = 35.0
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)
ATTEMPTS = 100
"""To open a lock whose folder another start may take away at that moment."""
FLOCK = "hhqqi4x"
"""Linux' struct flock: type, whence, start, length, process."""


@contextmanager
def held(directory: RunDirectory, tell: Callable[[str], None]) -> Iterator[None]:
    """Inside, no other process may use `directory`. Raises `UserError` where one does.

    Where no run has begun at the end, nothing of the lock stays, and none of the folders that were made for it.
    """
    with locked(directory.lock, "output.name", str(directory.path), tell, directory.settings.is_file):
        yield


@contextmanager
def locked(
    folder: Path, key: str, what: str, tell: Callable[[str], None], stays: Callable[[], bool] = lambda: True
) -> Iterator[None]:
    """Inside, no other process holds the lock in `folder`. Raises `UserError`, naming `key` and `what`, where one does.

    A holder on another machine that left without a word is waited for, until it is sure that it beats no more. The
    lock's files stay, for the next one, unless `stays` says otherwise at the end.
    """
    holder, file = folder / "holder", folder / "lock"
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    with ExitStack() as stack:
        stack.callback(remove_empty, folder, made)
        stack.callback(os.close, opened(file, holder, f"{key}: {what}", tell))  # which gives the lock back
        stack.callback(forget, file, stays)
        stack.enter_context(beating(holder))
        yield


def opened(file: Path, holder: Path, what: str, tell: Callable[[str], None]) -> int:
    """The lock, open and taken."""
    for _ in range(ATTEMPTS):
        with as_user_error(file), suppress(FileNotFoundError):  # another start that is refused takes it away
            file.parent.mkdir(parents=True, exist_ok=True)
            lock = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                take(lock, holder, what, tell)
                if os.path.samestat(os.fstat(lock), file.stat()):
                    return lock
            except BaseException:
                os.close(lock)
                raise
            os.close(lock)
    raise UserError(f"{what}: {file} is taken away by another process again and again")


def forget(file: Path, stays: Callable[[], bool]) -> None:
    """Remove a lock that is still held, unless it stays: whoever has opened it sees that it is another's."""
    if not stays():
        file.unlink(missing_ok=True)


def remove_empty(folder: Path, made: Sequence[Path]) -> None:
    for each in dict.fromkeys((folder, *made)):
        with suppress(OSError):  # it holds something, or never was
            each.rmdir()


def holder_of(directory: RunDirectory) -> str | None:
    """Who works in a directory now, None where nobody does. It takes nothing.

    Not for a process that holds the lock itself: it would lose it.
    """
    who = read(directory.lock / "holder") or "another process"
    try:
        with (directory.lock / "lock").open("rb") as lock:
            found = fcntl.fcntl(lock, fcntl.F_GETLK, struct.pack(FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
    except FileNotFoundError:
        return None
    except OSError as error:
        return read(directory.lock / "holder") if error.errno in UNSUPPORTED else None
    return None if struct.unpack_from(FLOCK, found)[0] == fcntl.F_UNLCK else who


def take(lock: int, holder: Path, what: str, tell: Callable[[str], None]) -> None:
    last = read(holder)
    in_use = f"{what} is in use by {last or 'another process'}; its run must end first"
    certain = True
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise UserError(in_use) from None
        if error.errno not in UNSUPPORTED:
            raise
        certain = False
    if last is None or (certain and last.startswith(f"{socket.gethostname()} ")):
        return
    tell(f"the last holder, {last}, did not say good-bye: waiting up to {DEAD_SECONDS:.0f} s to see whether it lives")
    deadline = time.monotonic() + DEAD_SECONDS
    while time.monotonic() < deadline:
        now = read(holder)
        if now is None:
            return
        if now != last:
            raise UserError(in_use)
        time.sleep(1.0)


def read(holder: Path) -> str | None:
    """The holder's host, process and last beat."""
    try:
        values = json.loads(holder.read_text(encoding="utf-8"))
        return f"{values['host']} process {values['pid']} (beat {values['beat']})"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


@contextmanager
def beating(holder: Path) -> Iterator[None]:
    """Count up in `holder` until the end, and remove it then."""
    ended = threading.Event()
    about = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}

    def beat(count: int) -> None:
        with suppress(OSError):  # a full disk is told by what training writes
            write_text(holder, json.dumps(about | {"beat": count}))

    def go_on() -> None:
        count = 1
        while not ended.wait(BEAT_SECONDS):
            count += 1
            beat(count)

    beat(1)
    thread = threading.Thread(target=go_on, name="lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        holder.unlink(missing_ok=True)
