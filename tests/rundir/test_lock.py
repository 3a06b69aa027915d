"""One process at a time in a run directory, and none that is dead."""

import json
import multiprocessing
import os
import signal

import pytest

from dskd.config.errors import UserError
from dskd.rundir import lock
from dskd.rundir.layout import RunDirectory

SPAWN = multiprocessing.get_context("spawn")


def hold(directory, pipe):
    with lock.held(RunDirectory(directory), print):
        pipe.send("held")
        pipe.poll(60)


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock. An event in place of the pipe would wait for ever for one that was killed."""
    ours, theirs = SPAWN.Pipe()
    process = SPAWN.Process(target=hold, args=(tmp_path, theirs))
    process.start()
    assert ours.poll(60)
    assert ours.recv() == "held"
    yield process
    if process.is_alive():
        ours.send("end")
    process.join()


def test_a_second_process_is_refused_and_told_by_whom(holder, tmp_path):
    with (
        pytest.raises(UserError, match=f"{tmp_path} is in use by .*process {holder.pid}"),
        lock.held(RunDirectory(tmp_path), print),
    ):
        pass


def test_a_killed_holder_holds_nothing(holder, tmp_path):
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    with lock.held(RunDirectory(tmp_path), pytest.fail):
        assert json.loads((tmp_path / ".lock" / "holder").read_text())["pid"] == os.getpid()


def test_what_is_left_does_not_count_as_a_run(tmp_path):
    with lock.held(RunDirectory(tmp_path), print):
        pass
    assert [p.name for p in tmp_path.rglob("*")] == [".lock", "lock"]


@pytest.mark.parametrize("lives", [True, False])
def test_where_locks_do_not_reach_other_machines_beats_tell(lives, tmp_path, monkeypatch):
    """A holder on another host that did not say good-bye: refused while it beats, taken over once it does not."""
    monkeypatch.setattr(lock, "DEAD_SECONDS", 3.0)
    holder = tmp_path / ".lock" / "holder"
    holder.parent.mkdir()
    about = {"host": "another", "pid": 1}
    holder.write_text(json.dumps(about | {"beat": 1}))

    def tell(text):
        assert "another process 1" in text
        if lives:
            holder.write_text(json.dumps(about | {"beat": 2}))

    if lives:
        with pytest.raises(UserError, match="in use by another process 1"), lock.held(RunDirectory(tmp_path), tell):
            pass
    else:
        with lock.held(RunDirectory(tmp_path), tell):
            pass
