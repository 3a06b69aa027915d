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


def test_where_a_run_has_begun_the_lock_s_file_stays(tmp_path):
    with lock.held(RunDirectory(tmp_path), print):
        (tmp_path / "run.yaml").touch()
    assert sorted(p.name for p in tmp_path.rglob("*")) == [".lock", "lock", "run.yaml"]


def test_where_none_has_begun_nothing_stays_but_what_was_there(tmp_path):
    directory = tmp_path / "outputs" / "student" / "sft" / "new"
    with pytest.raises(UserError, match="refused"), lock.held(RunDirectory(directory), print):
        raise UserError("refused")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "outputs" / "student").mkdir(parents=True)
    (tmp_path / "mine").touch()
    for folder in (directory, tmp_path):
        with lock.held(RunDirectory(folder), print):
            assert (folder / ".lock" / "lock").is_file()
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["mine", "outputs", "student"]


def one_after_another(directory, pipe):
    """Held and left again and again, while others do the same; how often somebody else was there."""
    met = refused = 0
    for _ in range(300):
        try:
            with lock.held(RunDirectory(directory), print):
                inside = directory.parent / "inside"
                try:
                    inside.touch(exist_ok=False)
                except FileExistsError:
                    met += 1
                inside.unlink(missing_ok=True)
        except UserError:
            refused += 1
    pipe.send((met, refused))


def test_starts_that_are_refused_at_one_moment_never_hold_it_together(tmp_path):
    pipes, processes = [], []
    for _ in range(3):
        ours, theirs = SPAWN.Pipe()
        processes.append(SPAWN.Process(target=one_after_another, args=(tmp_path / "a" / "run", theirs)))
        processes[-1].start()
        pipes.append(ours)
    results = [pipe.recv() for pipe in pipes if pipe.poll(60)]
    for process in processes:
        process.join()
    assert len(results) == 3
    assert [met for met, _ in results] == [0, 0, 0]
    assert sum(refused for _, refused in results) > 0
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_who_holds_it_can_be_asked(holder, tmp_path):
    assert f"process {holder.pid} " in lock.holder_of(RunDirectory(tmp_path))
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    assert lock.holder_of(RunDirectory(tmp_path)) is None
    assert lock.holder_of(RunDirectory(tmp_path / "none")) is None


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
