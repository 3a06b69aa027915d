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
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dskd.config.errors import UserError
from dskd.rundir.files import as_user_error, write_text
from dskd.rundir.layout import RunDirectory

BEAT_SECONDS = 10.0
DEAD_SECONDS = 35.0
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)


@contextmanager
def held(directory: RunDirectory, tell: Callable[[str], None]) -> Iterator[None]:
    """Inside, no other process may use `directory`. Raises `UserError` where one does.

    A holder on another machine that left without a word is waited for, until it is sure that it beats no more.
    """
    holder = directory.lock / "holder"
    with as_user_error(directory.path):
        directory.lock.mkdir(parents=True, exist_ok=True)
        lock = os.open(directory.lock / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        take(lock, holder, tell)
        with beating(holder):
            yield
    finally:
        os.close(lock)  # which gives the lock back


def take(lock: int, holder: Path, tell: Callable[[str], None]) -> None:
    last = read(holder)
    in_use = f"output.name: {holder.parents[1]} is in use by {last or 'another process'}; its run must end first"
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
