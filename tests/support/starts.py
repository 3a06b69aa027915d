"""Starts of `dskd` without the ten seconds of imports: each is a process of its own, forked off a server that has them.

All else is as on the command line: real processes, ranks, signals and exit codes.
"""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from soak.harm import arm_this_process

from dskd.launch.ranks import free_port, rank_environment

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["dskd.train", "torch.utils.tensorboard.writer"])


def run_dskd(arguments: list[str], environment: dict[str, str], output: Path) -> None:
    """In the new process."""
    os.environ |= environment
    arm_this_process()
    multiprocessing.set_start_method("fork", force=True)  # as in a process of the command line
    with output.open("ab", buffering=0) as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    sys.argv = ["dskd", *arguments]
    from dskd.cli import main

    main()


def ignores(pid: int, number: int) -> bool:
    """Whether a process ignores a signal: a new one has the server's handlers for a moment, and that ignores Ctrl-C."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("SigIgn:"):
                return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    return False


STARTED: list["Start"] = []


def end_all() -> None:
    """SIGKILL to whatever a test has left."""
    for start in STARTED:
        start.send(signal.SIGKILL)
    STARTED.clear()


class Start:
    """One start of a command on some ranks, which write to `output`."""

    def __init__(self, output: Path, *arguments: object, ranks: int = 1, **environment: str) -> None:
        self.output, port = output, free_port()
        words = [str(argument) for argument in arguments]
        self.ranks = []
        STARTED.append(self)
        for rank in range(ranks):
            places = rank_environment(rank, ranks, port) | environment
            self.ranks.append(SERVER.Process(target=run_dskd, args=(words, places, output)))
            self.ranks[-1].start()

    def send(self, number: int, *ranks: int) -> None:
        """A signal to these ranks, or to all that run."""
        for process in [self.ranks[rank] for rank in ranks] or self.ranks:
            while process.is_alive() and ignores(process.pid, number):
                time.sleep(0.001)
            if process.is_alive():
                os.kill(process.pid, number)

    def wait(self, seconds: float = 300) -> list[int]:
        """The exit codes of all ranks; a signal's number is negative."""
        deadline = time.monotonic() + seconds
        for process in self.ranks:
            process.join(max(0.0, deadline - time.monotonic()))
        late = [rank for rank, process in enumerate(self.ranks) if process.is_alive()]
        if late:
            self.send(signal.SIGKILL)
            raise AssertionError(f"ranks {late} still ran after {seconds} s:\n{self.text()[-3000:]}")
        return [process.exitcode for process in self.ranks]

    def until(self, condition: Callable[[], object], seconds: float = 300) -> bool:
        """Wait until a condition holds (True) or all ranks have ended (False)."""
        deadline = time.monotonic() + seconds
        while not condition():
            if not any(process.is_alive() for process in self.ranks):
                return bool(condition())
            if time.monotonic() > deadline:
                self.send(signal.SIGKILL)
                raise AssertionError(f"nothing of the kind within {seconds} s:\n{self.text()[-3000:]}")
            time.sleep(0.001)
        return True

    def text(self) -> str:
        return self.output.read_text(errors="replace") if self.output.exists() else ""


def finish(output: Path, *arguments: object, ranks: int = 1, code: int = 0, **environment: str) -> str:
    """Run a command to its end; returns what it wrote. All ranks must end with `code`."""
    output.unlink(missing_ok=True)
    start = Start(output, *arguments, ranks=ranks, **environment)
    codes = start.wait()
    assert codes == [code] * ranks, f"{codes}\n{start.text()[-3000:]}"
    return start.text()
