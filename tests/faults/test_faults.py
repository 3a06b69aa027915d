"""Broken disks, broken states, dead and hanging ranks: nothing before the last whole state is lost."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.compare import figures, lines, newest_state, steps
from support.disks import disk_of
from support.starts import Start, finish

from dskd.launch.ranks import rank_environment

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def whole(small_run, tmp_path_factory):
    """The run that nothing befalls."""
    root = tmp_path_factory.mktemp("whole")
    finish(root / "log", "train", small_run, f"output.root={root}")
    return next(root.glob("*/*/default"))


@pytest.fixture(scope="module")
def stopped(small_run, tmp_path_factory):
    """A run that was asked to stop, with two states."""
    root = tmp_path_factory.mktemp("stopped")
    start = Start(root / "log", "train", small_run, f"output.root={root}")
    start.until(lambda: any(steps(directory) >= 7 for directory in root.glob("*/*/default")))
    start.send(signal.SIGTERM)
    assert start.wait() == [75]
    return next(root.glob("*/*/default"))


@pytest.fixture
def cut(stopped, tmp_path):
    """A copy of it, under another root."""
    target = tmp_path / stopped.relative_to(stopped.parents[2])
    shutil.copytree(stopped, target)
    return target


def states(directory: Path) -> list[Path]:
    """Newest first."""
    return sorted(directory.glob("resume/step*"), key=lambda p: int(p.name[4:].split("-")[0]), reverse=True)


def test_resume_needs_the_directory_alone_wherever_it_lies(cut, whole, tmp_path):
    step = newest_state(cut)["step"]
    assert f"going on after step {step}\n" in finish(tmp_path / "log", "resume", cut)
    assert figures(cut) == figures(whole)


@pytest.mark.parametrize("fault", ["truncated", "flipped", "missing", "no manifest"])
def test_a_damaged_state_is_named_and_the_one_before_is_used(fault, cut, whole, tmp_path):
    newest, older = states(cut)
    file = newest / "rank0.safetensors"
    content = file.read_bytes()
    if fault == "truncated":
        file.write_bytes(content[:-100])
    elif fault == "flipped":
        middle = len(content) // 2
        file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    elif fault == "missing":
        file.unlink()
    else:
        (newest / "MANIFEST.json").unlink()
    told = finish(tmp_path / "log", "resume", cut)
    assert f"state {newest} is damaged and not used: " in told
    assert f"going on after step {older.name[4:]}" in told
    assert f"state {newest} is damaged" in (cut / "train.log").read_text()
    assert figures(cut) == figures(whole)


def test_where_no_state_is_whole_nothing_is_thrown_away(cut, tmp_path):
    for folder in states(cut):
        (folder / "state.json").write_text("{")
    before = (cut / "metrics.jsonl").read_bytes()
    assert "no state is whole" in finish(tmp_path / "log", "resume", cut, code=2)
    assert (cut / "metrics.jsonl").read_bytes() == before


def test_latest_may_point_nowhere(cut, whole, tmp_path):
    (cut / "resume" / "LATEST").write_text("step999\n")
    assert "names 'step999', which is not there" in finish(tmp_path / "log", "resume", cut)
    assert figures(cut) == figures(whole)


def test_a_torn_tail_of_the_metrics_is_repaired(cut, whole, tmp_path):
    with (cut / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"step": 8, "loss": 1.0}\n{"step": 9, "lo')
    finish(tmp_path / "log", "resume", cut)
    assert figures(cut) == figures(whole)


def test_changed_settings_are_listed_and_only_harmless_ones_accepted(cut, whole, tmp_path):
    refused = finish(tmp_path / "log", "resume", cut, "train.lr=0.1", code=2)
    assert "train.lr: 0.0005 -> 0.1" in refused
    assert len(refused.splitlines()) == 1
    told = finish(tmp_path / "log", "resume", cut, "train.micro_batch_size=4", "checkpoint.every_steps=3")
    assert "changed: train.micro_batch_size: 2 -> 4" in told
    expected, found = ([line["loss"] for line in lines(d) if "loss" in line] for d in (whole, cut))
    assert found == pytest.approx(expected, abs=1e-4)


def test_force_goes_on_with_other_settings(cut, tmp_path):
    assert "changed: train.lr: 0.0005 -> 0.0001" in finish(tmp_path / "log", "resume", cut, "train.lr=1e-4", "--force")
    assert steps(cut) == 20


def test_a_finished_run_stays_as_it_is(whole, small_run, tmp_path):
    before = (whole / "metrics.jsonl").read_bytes()
    told = finish(tmp_path / "log", "train", small_run, f"output.root={whole.parents[2]}")
    assert "finished already; best model epoch" in told
    assert (whole / "metrics.jsonl").read_bytes() == before


def test_a_second_process_is_refused_and_a_dead_one_holds_nothing(small_run, whole, tmp_path):
    command = ["train", small_run, f"output.root={tmp_path}", "data.workers=1"]
    directory = tmp_path / whole.relative_to(whole.parents[2])
    first = Start(tmp_path / "log1", *command)
    first.until(lambda: steps(directory) >= 2)
    assert "is in use by " in finish(tmp_path / "log2", *command, code=2)
    first.send(signal.SIGKILL)
    assert first.wait() == [-signal.SIGKILL]
    finish(tmp_path / "log3", *command)  # at once, though the dead one's worker may still be there
    assert figures(directory) == figures(whole)


@pytest.fixture
def disk(tmp_path):
    """A file system of its own."""
    with disk_of("20m", tmp_path / "disk") as folder:
        yield folder


def test_a_full_disk(small_run, whole, disk, tmp_path):
    command = ["train", small_run, f"output.root={disk}"]
    directory = disk / whole.relative_to(whole.parents[2])
    start = Start(tmp_path / "log", *command)
    start.until(lambda: (directory / "resume" / "LATEST").exists())  # written while training goes on
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as out, contextlib.suppress(OSError):
        while True:
            out.write(b"0" * 4096)
    assert start.wait() == [2], start.text()
    told = start.text().splitlines()[-1]
    assert told.startswith("dskd: output.root: cannot write ")
    assert told.endswith("No space left on device")
    filler.unlink()
    assert newest_state(directory)["step"] >= 2
    finish(tmp_path / "log", "resume", directory)
    assert figures(directory) == figures(whole)


def test_a_read_only_disk(stopped, whole, disk, tmp_path):
    directory = disk / stopped.relative_to(stopped.parents[2])
    shutil.copytree(stopped, directory)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    (told,) = finish(tmp_path / "log", "resume", directory, code=2).splitlines()
    assert told.startswith(f"dskd: output.root: cannot write {disk}")
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    finish(tmp_path / "log", "resume", directory)
    assert figures(directory) == figures(whole)


def launched(*arguments: object) -> subprocess.Popen:
    """The command as it is typed, with two ranks."""
    clean = {k: v for k, v in os.environ.items() if k not in rank_environment(0, 1, 0)}
    command = [sys.executable, "-m", "dskd", *map(str, arguments), "launch.processes=2"]
    return subprocess.Popen(command, env=clean, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def rank_of(launcher: subprocess.Popen, rank: int) -> int:
    """The process id of one of its ranks."""
    for child in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split():
        if f"\0RANK={rank}\0" in "\0" + Path(f"/proc/{child}/environ").read_text():
            return int(child)
    raise AssertionError(f"no rank {rank}")


@pytest.mark.parametrize(
    ("number", "reason"), [(signal.SIGKILL, "Current thread"), (signal.SIGSTOP, "nothing has moved for")]
)
def test_a_rank_that_dies_or_hangs_ends_the_run(number, reason, small_run, whole, tmp_path):
    directory = tmp_path / whole.relative_to(whole.parents[2])
    # A state is saved after the second step: the signal may meet a rank there as well, which has a limit of its own.
    limits = "train.stall_minutes=0.2", "train.save_minutes=0.2"
    launcher = launched("train", small_run, f"output.root={tmp_path}", *limits)
    deadline = time.monotonic() + 200
    while steps(directory) < 2:
        assert launcher.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.001)
    other = rank_of(launcher, 1)
    os.kill(other, number)
    try:
        error = launcher.communicate(timeout=200)[1]
    finally:
        launcher.terminate()  # nothing where it has ended
    assert launcher.returncode == 75, error
    assert reason in error
    assert "all_reduce" in error or "all_gather" in error or "train_step" in error  # where rank 0 waited
    assert not Path(f"/proc/{other}").exists()
    finish(tmp_path / "log", "resume", directory, "train.stall_minutes=20", "train.save_minutes=60", ranks=2)
    assert steps(directory) == 20


def test_from_the_signal_to_the_end_in_seconds(small_run, whole, tmp_path):
    directory = tmp_path / whole.relative_to(whole.parents[2])
    start = Start(tmp_path / "log", "train", small_run, f"output.root={tmp_path}", "data.workers=1", ranks=2)
    start.until(lambda: steps(directory) >= 3)
    asked = time.monotonic()
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        start.send(number)
    assert start.wait() == [75, 75]
    slowest = max(float(line["seconds"]) for line in lines(directory) if "loss" in line)
    assert time.monotonic() - asked < 5 + 3 * slowest


def test_by_way_of_a_scratch_folder_nothing_changes(small_run, whole, tmp_path):
    directory = tmp_path / "out" / whole.relative_to(whole.parents[2])
    command = ["train", small_run, f"output.root={tmp_path}/out", f"checkpoint.scratch_dir={tmp_path}/scratch"]
    for number, until in ((signal.SIGTERM, 4), (signal.SIGKILL, 11)):
        start = Start(tmp_path / "log", *command)
        start.until(lambda until=until: steps(directory) >= until)
        start.send(number)
        start.wait()
    finish(tmp_path / "log", *command)
    assert figures(directory) == figures(whole)
    assert newest_state(directory)["finished"]
    assert [p for p in (tmp_path / "scratch").rglob("*") if p.is_file()] == []
