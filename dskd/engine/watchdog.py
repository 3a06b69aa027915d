"""Ends a run that hangs: a rank that died elsewhere must not leave the others waiting in a collective for ever."""

import faulthandler
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from dskd.config.stopping import UNFINISHED
from dskd.engine.preemption import Flags

LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused")
"""What gloo says when another rank is gone."""


def show_stacks_on_request() -> None:
    """SIGQUIT (kill -QUIT PID) shows where every thread of this process is, and the process goes on."""
    faulthandler.register(signal.SIGQUIT, all_threads=True, chain=False)


@contextmanager
def watchdog(flags: Flags, minutes: float) -> Iterator[None]:
    """Inside, this process ends with `UNFINISHED` and shows its stacks when `flags.moves` stands still for so long.

    Time is counted in wake-ups of a thread of this process, so that a suspended and continued process is not taken for
    one that hangs.
    """
    interval, ended = min(1.0, 6 * minutes), threading.Event()

    def watch() -> None:
        seen, silent = flags.moves, 0.0
        while not ended.wait(interval):
            silent = silent + interval if flags.moves == seen else 0.0
            seen = flags.moves
            if silent > 60 * minutes:
                end_here(f"nothing has moved for {minutes:g} minutes (train.stall_minutes)")

    threading.Thread(target=watch, name="watch", daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def end_here(reason: str) -> None:
    """Leave at once, from any thread, whatever the others wait for."""
    rank = os.environ.get("RANK", "0")
    print(f"dskd: rank {rank}: {reason}; the run can be started again; where it was:", file=sys.stderr)
    faulthandler.dump_traceback(sys.stderr, all_threads=True)
    sys.stderr.flush()
    os._exit(UNFINISHED)


def is_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because another rank is gone."""
    named = type(error).__name__ in ("DistNetworkError", "DistBackendError")
    return named or (isinstance(error, RuntimeError) and any(text in str(error) for text in LOST))
