"""Stopping on request: signals set a flag, and the ranks agree on it at the boundary of a step. Torch-free."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Literal

from dskd.config.stopping import STOP_SIGNALS

Phase = Literal["start", "step", "save"]
"""What a rank is at: until its first step, a step or an evaluation, or saving."""


class Stopped(BaseException):
    """The run was asked to stop, and all ranks know it. No error, so that no library takes it for one of its own.

    Args:
        saved: the step of the state that was saved for it.
    """

    def __init__(self, saved: int | None = None) -> None:
        super().__init__()
        self.saved = saved


@dataclass
class Flags:
    """What signals, watchdog and training tell each other in this process."""

    stop_requested: bool = False
    """This process got a signal."""
    moves: int = 0
    """Counts up while this rank gets on; see `dskd.engine.watchdog`."""
    phase: Phase = "start"

    def moved(self) -> None:
        self.moves += 1

    @contextmanager
    def during(self, phase: Phase) -> Iterator[None]:
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before
            self.moved()


@dataclass(frozen=True)
class Decision:
    """What all ranks do, since at least one of them wants it."""

    stop: bool
    """Save the state and stop."""
    save: bool
    """Save the state."""


def watch_signals() -> Flags:
    """From now on a signal that asks to stop sets a flag instead of ending the process, however often it comes.

    Before the first step there is nothing to save: then the first one raises `Stopped` where the process is.
    """
    flags = Flags()

    def request(number: int, frame: FrameType | None) -> None:
        first, flags.stop_requested = not flags.stop_requested, True
        if first and flags.phase == "start":
            raise Stopped
        if first and os.environ.get("RANK", "0") == "0":
            # Not by print, which may be what the signal has interrupted.
            os.write(2, b"dskd: stopping after this step, and saving what is done\n")

    for number in STOP_SIGNALS:
        signal.signal(number, request)
    tell_before = sys.unraisablehook

    def tell(unraisable: "sys.UnraisableHookArgs") -> None:
        if not isinstance(unraisable.exc_value, Stopped):
            tell_before(unraisable)

    # A stop that came within a callback of the interpreter goes no further; the watchdog ends what it did not.
    sys.unraisablehook = tell
    return flags


def ignore_signals(worker: int = 0) -> None:
    """For helper processes: a signal sent to the whole job must not end them before the step that needs them."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
