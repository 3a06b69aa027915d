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

TAIL_LINES = 30
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


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
    SIGINT, SIGUSR1 and SIGUSR2 are passed on. When one rank fails the others are ended, which would else wait for ever.
    """
    command, port = [sys.executable, "-m", "dskd", *arguments], free_port()
    threads = str(max(1, (os.cpu_count() or 1) // processes))
    with ExitStack() as stack:
        outputs = [None, *(stack.enter_context(tempfile.TemporaryFile()) for _ in range(1, processes))]
        ranks: list[subprocess.Popen[bytes]] = []
        for number in PASSED_ON:  # before the first rank starts: a signal in between would leave orphans
            stack.callback(signal.signal, number, signal.signal(number, lambda n, _: pass_on(ranks, n)))
        for rank, output in enumerate(outputs):
            environment = {"OMP_NUM_THREADS": threads} | os.environ | rank_environment(rank, processes, port)
            ranks.append(subprocess.Popen(command, env=environment, stdout=output, stderr=output))
        failed = wait_for_all(ranks)
        if failed is None:
            return 0
        end(ranks)
        show_tail(failed, outputs[failed])
        return exit_code(ranks[failed].returncode)


def pass_on(ranks: Sequence[subprocess.Popen[bytes]], number: int) -> None:
    for process in ranks:
        if process.poll() is None:
            process.send_signal(number)


def wait_for_all(ranks: Sequence[subprocess.Popen[bytes]]) -> int | None:
    """Wait until all ranks have ended well (None) or one has failed: which.

    A mistake that all ranks notice, with the same code, is best told by rank 0, which writes to the terminal.
    """
    while not any(codes := [process.poll() for process in ranks]):
        if None not in codes:
            return None
        time.sleep(0.05)
    first = next(rank for rank, code in enumerate(codes) if code)
    time.sleep(0.5)  # rank 0 may notice it a moment later
    return 0 if ranks[0].poll() == ranks[first].returncode else first


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


def exit_code(returncode: int) -> int:
    """A process ended by signal N has the shell's code for it."""
    return returncode if returncode >= 0 else 128 - returncode
