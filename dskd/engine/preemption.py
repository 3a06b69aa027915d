"""Stopping on request: signals set a flag, and the ranks agree on it at the boundary of a step."""

import signal
import time
from dataclasses import dataclass
from types import FrameType

UNFINISHED = 75
"""Exit code for "not finished, run me again" (EX_TEMPFAIL)."""
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class Stopped(Exception):
    """The run was asked to stop, and all ranks know it."""


@dataclass
class Flags:
    """What this rank wants, and what all ranks have agreed on."""

    stop_requested: bool = False
    """This process got a signal."""
    save_at: float | None = None
    """Time of `time.monotonic()` from which on a state is due, on this rank's clock."""
    moves: int = 0
    """Counts up while this rank gets on; see `dskd.engine.watch`."""
    stop: bool = False
    save: bool = False

    def wanted(self) -> tuple[float, float]:
        """What this rank adds to the sum over all ranks: stop, save."""
        return float(self.stop_requested), float(self.save_at is not None and time.monotonic() >= self.save_at)

    def agree(self, stop: float, save: float) -> None:
        """Take over the sums; a stop that is agreed on stays."""
        self.stop, self.save = self.stop or stop > 0, save > 0


def watch_signals() -> Flags:
    """From now on a signal that asks to stop sets a flag instead of ending the process, however often it comes."""
    flags = Flags()

    def request(number: int, frame: FrameType | None) -> None:
        flags.stop_requested = True

    for number in STOP_SIGNALS:
        signal.signal(number, request)
    return flags


def ignore_signals(worker: int = 0) -> None:
    """For helper processes: a signal sent to the whole job must not end them before the step that needs them."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
