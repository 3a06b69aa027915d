"""Stops and hangs before the first step, and processes that die: a run always ends, soon and with a true code."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.compare import figures, steps
from support.starts import Start, finish

from dskd.launch.ranks import free_port, new_secret, rank_environment

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def whole(small_run, tmp_path_factory):
    """The run that nothing befalls."""
    root = tmp_path_factory.mktemp("whole")
    finish(root / "log", "train", small_run, f"output.root={root}")
    return next(root.glob("*/*/default"))


def typed(*arguments: object, **environment: str) -> subprocess.Popen:
    """The command as it is typed."""
    clean = {k: v for k, v in os.environ.items() if k not in rank_environment(0, 1, 0)}
    command = [sys.executable, "-m", "dskd", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=clean | environment, **pipes)


def children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def until(condition, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def listens(port: int) -> bool:
    """Whether a process of this machine listens on a TCP port."""
    lines = [line.split() for table in ("tcp", "tcp6") for line in Path(f"/proc/net/{table}").read_text().splitlines()]
    return any(line[1].endswith(f":{port:04X}") and line[3] == "0A" for line in lines)


@pytest.mark.parametrize("after", [0.1, 0.4, 0.8, 1.2, 1.6, 2.0, 2.5, 3.0])
def test_a_stop_during_the_start_of_two_ranks_is_never_lost(after, small_run, tmp_path):
    launcher = typed("train", small_run, f"output.root={tmp_path}", "launch.processes=2", "train.epochs=4000")
    time.sleep(after)
    launcher.send_signal(signal.SIGTERM)
    asked = time.monotonic()
    told, _ = launcher.communicate(timeout=60)
    # Before the launcher has its handlers the signal ends it as it ends any program.
    assert launcher.returncode in (75, -signal.SIGTERM), told
    assert time.monotonic() - asked < 20
    assert "Traceback" not in told


@pytest.mark.parametrize("number", [None, signal.SIGTERM, signal.SIGINT])
def test_a_rank_that_waits_for_another_in_vain_ends(number, small_run, tmp_path):
    """By its own limit, or when it is asked to stop, though it waits inside a library."""
    port = free_port()
    alone = rank_environment(0, 2, port, new_secret())
    minutes = 0.1 if number is None else 30
    rank = typed("train", small_run, f"output.root={tmp_path}", f"train.start_minutes={minutes}", **alone)
    if number is not None:
        until(lambda: listens(port), 120)  # for the other rank, which never comes
        time.sleep(0.5)
        rank.send_signal(number)
    told, _ = rank.communicate(timeout=60)
    assert rank.returncode == 75, told
    assert ("train.start_minutes" if number is None else "asked to stop") in told


def test_a_killed_data_worker_makes_the_run_unfinished(small_run, whole, tmp_path):
    directory = tmp_path / whole.relative_to(whole.parents[2])
    command = ["train", small_run, f"output.root={tmp_path}", "data.workers=1"]
    start = Start(tmp_path / "log", *command)
    start.until(lambda: steps(directory) >= 2)
    (worker,) = children(start.ranks[0].pid)
    os.kill(worker, signal.SIGKILL)
    assert start.wait() == [75], start.text()
    assert "a process that makes batches is gone" in start.text()
    finish(tmp_path / "log", *command)
    assert figures(directory) == figures(whole)


def test_ranks_end_with_their_launcher(small_run, whole, tmp_path):
    directory = tmp_path / whole.relative_to(whole.parents[2])
    launcher = typed("train", small_run, f"output.root={tmp_path}", "launch.processes=2", "train.epochs=4000")
    until(lambda: steps(directory) >= 2, 200)
    ranks = children(launcher.pid)
    assert len(ranks) == 2
    launcher.kill()
    launcher.wait()
    until(lambda: not any(Path(f"/proc/{rank}").exists() for rank in ranks), 20)
    state = directory / "resume" / (directory / "resume" / "LATEST").read_text().strip()
    assert state.is_dir()  # they have saved what they had


def test_a_run_with_tensorboard_on_a_full_disk_goes_on(small_run, whole, tmp_path):
    """TensorBoard's folder alone refuses what is written to it."""
    directory = tmp_path / whole.relative_to(whole.parents[2])
    directory.mkdir(parents=True)
    (directory / "job").mkdir()
    start = Start(tmp_path / "log", "train", small_run, f"output.root={tmp_path}")
    start.until(lambda: (directory / "tensorboard").is_dir())
    for file in (directory / "tensorboard").iterdir():
        file.unlink()
        file.symlink_to("/dev/full")
    assert start.wait() == [0], start.text()
    assert "Traceback" not in start.text()
    assert figures(directory) == figures(whole)
