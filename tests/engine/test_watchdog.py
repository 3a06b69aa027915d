"""The watchdog ends a process that stands still, and no other; each case is a process of its own."""

import subprocess
import sys

import pytest

from dskd.config.stopping import UNFINISHED

# In each phase a limit: half a second in the one that is watched, and hours in the others.
PROGRAM = """
import time
from dskd.engine.preemption import Flags
from dskd.engine.watchdog import watchdog
flags = Flags(phase={phase!r})
limits = dict.fromkeys(("start", "step", "save"), 600.0) | {{{limited!r}: 0.5 / 60}}
with watchdog(flags, limits):
    {then}
print("ended by itself")
"""
STANDS_STILL = "time.sleep(20)"
MOVES = "any(flags.moved() or time.sleep(0.1) for _ in range(15))"


def run(phase, limited, then):
    program = PROGRAM.format(phase=phase, limited=limited, then=then)
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    ("phase", "key"),
    [("start", "train.start_minutes"), ("step", "train.stall_minutes"), ("save", "train.save_minutes")],
)
def test_a_process_that_stands_still_is_ended_and_shows_where_it_was(phase, key):
    done = run(phase, phase, STANDS_STILL)
    assert (done.returncode, done.stdout) == (UNFINISHED, "")
    assert f"nothing has moved for 0.00833333 minutes ({key}); the run can be started again" in done.stderr
    assert 'File "<string>", line 8' in done.stderr


def test_a_process_that_moves_is_left_alone():
    done = run("step", "step", MOVES)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ended by itself\n", "")


def test_each_phase_has_a_limit_of_its_own():
    done = run("save", "step", "time.sleep(1.5)")
    assert (done.returncode, done.stdout, done.stderr) == (0, "ended by itself\n", "")
