"""What a signal does in a rank."""

import os
import signal
import sys
import weakref

import pytest

from dskd.config.stopping import STOP_SIGNALS
from dskd.engine.preemption import Stopped, ignore_signals, watch_signals


@pytest.fixture(autouse=True)
def handlers():
    """Those of pytest come back."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    hook = sys.unraisablehook
    yield
    sys.unraisablehook = hook
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", STOP_SIGNALS)
@pytest.mark.parametrize("phase", ["step", "save"])
def test_a_signal_is_kept_until_the_ranks_agree_on_it_however_often_it_comes(number, phase, capfd, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    flags = watch_signals()
    flags.phase = phase
    assert not flags.stop_requested
    for _ in range(3):
        send(number)
    assert flags.stop_requested
    assert capfd.readouterr().err == "dskd: stopping after this step, and saving what is done\n"


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_before_the_first_step_the_first_signal_stops_at_once(number):
    flags = watch_signals()
    with pytest.raises(Stopped):
        send(number)
    assert flags.stop_requested
    send(number)  # and the next one does not interrupt what follows


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_helpers_ignore_what_the_whole_job_is_sent(number):
    ignore_signals()
    send(number)
    assert signal.getsignal(number) == signal.SIG_IGN


def test_a_phase_ends_where_it_began_and_counts_as_a_move():
    flags = watch_signals()
    flags.phase, moves = "step", flags.moves
    with flags.during("save"):
        assert flags.phase == "save"
    assert (flags.phase, flags.moves) == ("step", moves + 1)


class Thing:
    """Something to refer to."""


def test_a_stop_within_a_callback_of_the_interpreter_leaves_no_traceback(monkeypatch):
    """Such as that of a weak reference, which ends no exception there."""
    told = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: told.append(unraisable.exc_type))
    flags, thing = watch_signals(), Thing()
    refers = weakref.ref(thing, lambda _: send(signal.SIGTERM))
    del thing
    assert refers() is None
    assert flags.stop_requested
    assert told == []
    thing = Thing()
    refers = weakref.ref(thing, lambda _: 1 / 0)
    del thing
    assert told == [ZeroDivisionError]
