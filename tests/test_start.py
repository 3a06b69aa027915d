"""How a rank ends."""

import os
import signal
import sys

import pytest

from dskd.config.errors import UserError
from dskd.config.stopping import STOP_SIGNALS, UNFINISHED
from dskd.config.training import TrainConfig
from dskd.engine.preemption import Flags
from dskd.start import as_rank


@pytest.fixture(autouse=True)
def rank(monkeypatch):
    """This process is a rank, and its handlers come back."""
    monkeypatch.setenv("RANK", "0")
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    hook = sys.unraisablehook
    yield
    sys.unraisablehook = hook
    for number, handler in before.items():
        signal.signal(number, handler)


def load(flags: Flags) -> None:
    """As a library that takes whatever is raised inside for a fault of the file that it reads."""
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    except BaseException:
        raise UserError("no tokenizer loads") from None


def test_a_stop_that_a_library_takes_for_an_error_is_still_a_stop(capfd):
    with pytest.raises(SystemExit) as ended:
        as_rank(TrainConfig(), load, lambda: "go on")
    assert ended.value.code == UNFINISHED
    assert capfd.readouterr().err == "dskd: stopped as asked; go on\n"


def test_without_a_stop_an_error_is_an_error():
    def fail(flags: Flags) -> None:
        raise UserError("no tokenizer loads")

    with pytest.raises(UserError, match="no tokenizer loads"):
        as_rank(TrainConfig(), fail, lambda: "go on")


def test_once_steps_are_made_an_error_is_one_whether_a_stop_was_asked_for_or_not():
    def fail(flags: Flags) -> None:
        flags.phase = "step"
        os.kill(os.getpid(), signal.SIGTERM)
        raise UserError("the loss is not finite")

    with pytest.raises(UserError, match="not finite"):
        as_rank(TrainConfig(), fail, lambda: "go on")
