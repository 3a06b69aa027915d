"""Several processes of the same command on this machine."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import IO

from dskd.config.stopping import STOP_SIGNALS, UNFINISHED

TAIL_LINES = 30
MOST_BYTES = 100_000
STOP_SECONDS = 20.0
"""How long ranks may differ in the time they need to stop."""


def free_port() -> int:
    """A TCP port on loopback that nothing uses at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def rank_environment(rank: int, processes: int, port: int) -> dict[str, str]:
    """What torch.distributed reads, for one of `processes` ranks on this machine."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
    return {name: str(value) for name, value in numbers.items()} | {"MASTER_ADDR": "127.0.0.1"}


def run_processes(arguments: Sequence[str], processes: int) -> int:
    """Run `dskd ARGUMENTS` as `processes` ranks; the exit code is that of the first rank that failed, or 0.

    Rank 0 writes to this terminal. What the others write is kept and shown only where one of them fails first. SIGTERM,
    SIGINT, SIGUSR1 and SIGUSR2 are passed on; ranks that stop with `UNFINISHED` are given time to do so together. When
    one rank fails the others are ended, which would else wait for ever. Where a signal ended a rank, or some hang while
    others stop, the code is `UNFINISHED`, and those that still ran show their stacks first.
    """
    command, port = [sys.executable, "-m", "dskd", *arguments], free_port()
    threads = str(max(1, (os.cpu_count() or 1) // processes))
    with ExitStack() as stack:
        outputs = [None, *(stack.enter_context(tempfile.TemporaryFile()) for _ in range(1, processes))]
        ranks: list[subprocess.Popen[bytes]] = []
        for number in STOP_SIGNALS:  # before the first rank starts: a signal in between would leave orphans
            stack.callback(signal.signal, number, signal.signal(number, lambda n, _: pass_on(ranks, n)))
        for rank, output in enumerate(outputs):
            environment = {"OMP_NUM_THREADS": threads} | os.environ | rank_environment(rank, processes, port)
            ranks.append(subprocess.Popen(command, env=environment, stdout=output, stderr=output))
        early = wait_for_all(ranks)
        codes = [process.poll() for process in ranks]
        failed = first_failed(early, codes)
        code = exit_code(None if failed is None else codes[failed])
        if code == UNFINISHED:
            show_stacks(ranks, outputs)
        end(ranks)
        if failed is not None and codes[failed] != UNFINISHED:
            show_tail(failed, outputs[failed])
        return code


def pass_on(ranks: Sequence[subprocess.Popen[bytes]], number: int) -> None:
    for process in ranks:
        if process.poll() is None:
            process.send_signal(number)


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


def show_tail(rank: int, output: IO[bytes] | None) -> None:
    if output is not None:
        output.seek(0)
        lines = output.read().decode(errors="replace").splitlines()[-TAIL_LINES:]
        print(f"rank {rank} failed first; the end of what it wrote:", *lines, sep="\n", file=sys.stderr)
