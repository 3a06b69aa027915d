"""Stopping on request: signals set a flag, and the ranks agree on it at the boundary of a step."""

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType

from dskd.config.stopping import STOP_SIGNALS


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
    copying: Callable[[], bool] = lambda: False
    """Whether this rank's background copies are under way."""
    stop: bool = False
    save: bool = False
    busy: bool = False

    def moved(self) -> None:
        self.moves += 1

    def wanted(self) -> tuple[float, float, float]:
        """What this rank adds to the sum over all ranks: stop, save, busy."""
        save = self.save_at is not None and time.monotonic() >= self.save_at
        return float(self.stop_requested), float(save), float(self.copying())

    def agree(self, stop: float, save: float, busy: float) -> None:
        """Take over the sums; a stop that is agreed on stays."""
        self.stop, self.save, self.busy = self.stop or stop > 0, save > 0, busy > 0


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
