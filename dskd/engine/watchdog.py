"""Ends a run that hangs: a rank that died elsewhere must not leave the others waiting in a collective for ever."""

import faulthandler
import os
import select
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from dskd.config.stopping import STOP_SIGNALS, UNFINISHED
from dskd.engine.preemption import Flags, Phase

LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused")
"""What gloo says when another rank is gone."""
WORKER_LOST = "DataLoader worker"
"""How torch's message begins where a process that makes batches was killed."""
KEYS: Mapping[Phase, str] = {
    "start": "train.start_minutes",
    "step": "train.stall_minutes",
    "save": "train.save_minutes",
}
STOP_SECONDS = 5.0
"""How long a stop may take before the first step, when there is nothing to save."""


def show_stacks_on_request() -> None:
    """SIGQUIT (kill -QUIT PID) shows where every thread of this process is, and the process goes on."""
    faulthandler.register(signal.SIGQUIT, all_threads=True, chain=False)


@contextmanager
def watchdog(flags: Flags, minutes: Mapping[Phase, float]) -> Iterator[None]:
    """Inside, this process ends with `UNFINISHED` and shows its stacks when it stands still for too long.

    It stands still while neither `flags.moves` nor `flags.phase` changes, and each phase has its own limit; a signal
    that asks to stop before the first step is followed within seconds, even where the main thread waits in a library
    that lets no handler of Python run. Time is counted in wake-ups of a thread of this process, so that a suspended
    and continued process is not taken for one that hangs.
    """
    interval, ended = min(1.0, 6 * min(minutes.values())), threading.Event()
    signalled, wake = os.pipe()
    os.set_blocking(wake, False)
    before = signal.set_wakeup_fd(wake, warn_on_full_buffer=False)

    def watch() -> None:
        seen, silent, asked = (flags.moves, flags.phase), 0.0, 0.0
        while not ended.wait(interval):
            now = flags.moves, flags.phase
            silent = silent + interval if now == seen else 0.0
            seen, phase = now, flags.phase
            if silent > 60 * minutes[phase]:
                end_here(f"nothing has moved for {minutes[phase]:g} minutes ({KEYS[phase]})")
            asked = asked + interval if asked or (phase == "start" and stop_signal_in(signalled)) else 0.0
            if asked > STOP_SECONDS and phase == "start":
                end_here("asked to stop before the first step")

    threading.Thread(target=watch, name="watchdog", daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        signal.set_wakeup_fd(before)


def stop_signal_in(pipe: int) -> bool:
    """Whether the numbers of signals that the interpreter wrote into a pipe hold one that asks to stop."""
    ready, _, _ = select.select([pipe], [], [], 0)
    return bool(ready) and any(number in STOP_SIGNALS for number in os.read(pipe, 4096))


def end_here(reason: str) -> None:
    """Leave at once, from any thread, whatever the others wait for."""
    rank = os.environ.get("RANK", "0")
    print(f"dskd: rank {rank}: {reason}; the run can be started again; where it was:", file=sys.stderr)
    faulthandler.dump_traceback(sys.stderr, all_threads=True)
    sys.stderr.flush()
    os._exit(UNFINISHED)


def why_lost(error: BaseException) -> str | None:
    """What is gone where an error says that another process is, which the next start has again; else None."""
    text = str(error)
    if isinstance(error, RuntimeError) and text.startswith(WORKER_LOST):
        return "a process that makes batches is gone"
    named = type(error).__name__ in ("DistNetworkError", "DistBackendError")
    if named or (isinstance(error, RuntimeError) and any(part in text for part in LOST)):
        return "another rank is gone"
    return None
