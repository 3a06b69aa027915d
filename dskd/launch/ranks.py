"""Ranks as child processes: supervised alike on one machine and in a Slurm task."""

import ctypes
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from types import FrameType
from typing import IO, Self

from dskd.config.stopping import STOP_SIGNALS, UNFINISHED

PR_SET_PDEATHSIG = 1
TAIL_LINES = 30
MOST_BYTES = 100_000
STOP_SECONDS = 20.0
"""How long ranks may differ in the time they need to stop."""


def free_port() -> int:
    """A TCP port that nothing on this machine uses at this moment, on any interface."""
    with socket.socket() as probe:
        probe.bind(("", 0))  # bound, and never listening
        port: int = probe.getsockname()[1]
    return port


def rank_environment(rank: int, processes: int, port: int, secret: str = "") -> dict[str, str]:
    """What `dskd.engine.distributed` reads, for one of `processes` ranks on this machine."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
    texts = {"MASTER_ADDR": "127.0.0.1", "DSKD_SECRET": secret}
    return {name: str(value) for name, value in numbers.items()} | texts


def new_secret() -> str:
    """What the ranks of one start know, and no other process."""
    return secrets.token_hex(32)


class Supervisor:
    """Ranks as children of this process: they get the signals that it gets, and end when it ends, however it does."""

    def __init__(self) -> None:
        self.ranks: list[subprocess.Popen[bytes]] = []
        self.received: list[int] = []
        """The signals that this process got."""

    def __enter__(self) -> Self:
        self.stack = ExitStack()
        for number in STOP_SIGNALS:
            self.stack.callback(signal.signal, number, signal.signal(number, self.pass_on))
        return self

    def __exit__(self, *error: object) -> None:
        self.stack.close()

    def start(self, command: Sequence[str], environment: Mapping[str, str], output: IO[bytes] | None) -> None:
        """Start the next rank; it writes to this terminal where `output` is None."""
        stdin = None if output is None else subprocess.DEVNULL
        self.ranks.append(
            subprocess.Popen(
                command, env=environment, stdin=stdin, stdout=output, stderr=output, preexec_fn=end_with(os.getpid())
            )
        )
        # One that came while the rank was being started was not passed on to it.
        for number in self.received:
            self.ranks[-1].send_signal(number)

    def pass_on(self, number: int, frame: FrameType | None) -> None:
        self.received.append(number)
        for process in self.ranks:
            if process.poll() is None:
                process.send_signal(number)


def end_with(parent: int) -> Callable[[], None]:
    """What a child does first: ask the kernel to be told to stop when its parent is gone."""
    libc = ctypes.CDLL(None)

    def ask() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(UNFINISHED)

    return ask


def run_processes(arguments: Sequence[str], processes: int) -> int:
    """Run `dskd ARGUMENTS` as `processes` ranks; the exit code is that of the first rank that failed, or 0.

    Rank 0 writes to this terminal. What the others write is kept and shown only where one of them fails first. SIGTERM,
    SIGINT, SIGUSR1 and SIGUSR2 are passed on; ranks that stop with `UNFINISHED` are given time to do so together. When
    one rank fails the others are ended, which would else wait for ever. Where a signal ended a rank, or some hang while
    others stop, the code is `UNFINISHED`, and those that still ran show their stacks first.
    """
    command, port, secret = [sys.executable, "-m", "dskd", *arguments], free_port(), new_secret()
    threads = str(max(1, (os.cpu_count() or 1) // processes))
    with ExitStack() as stack:
        outputs = [None, *(stack.enter_context(tempfile.TemporaryFile()) for _ in range(1, processes))]
        supervisor = stack.enter_context(Supervisor())
        for rank, output in enumerate(outputs):
            environment = {"OMP_NUM_THREADS": threads} | os.environ | rank_environment(rank, processes, port, secret)
            supervisor.start(command, environment, output)
        ranks = supervisor.ranks
        early = wait_for_all(ranks)
        codes = [process.poll() for process in ranks]
        failed = first_failed(early, codes)
        code = exit_code(None if failed is None else codes[failed])
        if code == UNFINISHED:
            show_stacks(ranks, outputs)
        end(ranks)
        if failed is not None and codes[failed] != UNFINISHED:
            show_tail(f"rank {failed} failed first", outputs[failed])
        return code


def wait_for_all(ranks: Sequence[subprocess.Popen[bytes]]) -> list[int | None]:
    """Wait until all ranks have ended or one has failed; then the others get time to tell why, or to stop as well.

    Returns each rank's code at the moment of the first failure.
    """
    while not any(codes := [process.poll() for process in ranks]) and None in codes:
        time.sleep(0.05)
    # Ranks that save their state stop together; another failure tells itself a moment later on rank 0.
    deadline = time.monotonic() + (STOP_SECONDS if UNFINISHED in codes else 0.5)
    while time.monotonic() < deadline and any(process.poll() is None for process in ranks):
        time.sleep(0.05)
    return codes


def first_failed(early: Sequence[int | None], codes: Sequence[int | None]) -> int | None:
    """The rank whose failure is told: one that a signal ended, else the first that failed for a reason of its own.

    A mistake that all ranks notice, with the same code, is best told by rank 0, which writes to the terminal.

    Args:
        early, codes: each rank's code when the first one failed, and now.
    """
    by_signal = [c for c in codes if c and c < 0]
    own_reason = [c for c in (*early, *codes) if c not in (None, 0, UNFINISHED)]
    failures = [*by_signal, *own_reason, *(c for c in codes if c)]
    return codes.index(failures[0]) if failures else None


def exit_code(failed: int | None) -> int:
    """Of a rank's code: `UNFINISHED` where a signal ended it, since it may go better the next time."""
    return UNFINISHED if failed is not None and failed < 0 else failed or 0


def show_stacks(ranks: Sequence[subprocess.Popen[bytes]], outputs: Sequence[IO[bytes] | None]) -> None:
    """Where those ranks are that still run: each shows it on SIGQUIT; rank 0 by itself, the others through us."""
    running = [(rank, outputs[rank], process) for rank, process in enumerate(ranks) if process.poll() is None]
    before = [os.fstat(output.fileno()).st_size if output else 0 for _, output, _ in running]
    for _, _, process in running:
        process.send_signal(signal.SIGQUIT)
    if running:
        time.sleep(1.0)
    for (rank, output, _), size in zip(running, before, strict=True):
        if output is not None:
            text = os.pread(output.fileno(), MOST_BYTES, size).decode(errors="replace")
            print(f"rank {rank} was here:\n{text}", file=sys.stderr)


def end(ranks: Sequence[subprocess.Popen[bytes]], patience: float = 5.0) -> None:
    """SIGTERM to those that still run, SIGKILL to those that stay."""
    for process in ranks:
        if process.poll() is None:
            process.terminate()
    deadline = time.monotonic() + patience
    for process in ranks:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def show_tail(what: str, output: IO[bytes] | None) -> None:
    """Tell `what` failed, and the end of what it wrote, unless it wrote to this terminal."""
    if output is not None:
        output.seek(0)
        lines = output.read().decode(errors="replace").splitlines()[-TAIL_LINES:]
        print(f"{what}; the end of what it wrote:", *lines, sep="\n", file=sys.stderr)
