"""The tasks of a job, and whole jobs from `dskd submit` to their end, with programs in the place of Slurm's.

A rank is a small shell script in the place of Python.
"""

import os
import signal
import subprocess
import sys

import pytest
from support.cluster import dskd, outcomes, submit
from support.fake_slurm import submitted, typed

from dskd.launch.status import statuses
from dskd.launch.task import ASKED
from dskd.rundir.jobs import Ending, Jobs, Meeting

TASK = """
import sys
from pathlib import Path
from dskd.launch import task
task.PATIENCE = 0.0
sys.exit(task.run_task(Path(sys.argv[1]), tuple(sys.argv[2:])))
"""
WAIT = "while :; do sleep 0.1; done"
PLACE = {"SLURM_JOB_ID": "12007", "SLURM_NTASKS": "4", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[3-4]"}
PLACE |= {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SUBMITIT_EXECUTOR": "slurm", "DSKD_START": "2"}


@pytest.fixture
def jobs(slurm, tmp_path):
    """Of a start that has begun."""
    jobs = Jobs.at(tmp_path)
    jobs.write_meeting(Meeting(20007, "told to no one"))
    return jobs


@pytest.fixture
def start(slurm, jobs):
    """Start one task of a job, whose rank is a shell script that runs in the folder of the test."""

    def start_task(script: str) -> subprocess.Popen:
        command = [sys.executable, "-c", TASK, str(slurm.folder), "/bin/sh", "-c", script]
        started = subprocess.Popen(command, env=os.environ | PLACE, cwd=slurm.folder, start_new_session=True)
        slurm.running["task"] = started
        return started

    return start_task


def test_a_rank_gets_its_place_from_slurm(jobs, start):
    script = "echo $RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE $MASTER_ADDR $MASTER_PORT"
    assert start(script).wait(60) == 0
    assert jobs.folder.log(2, 3).read_text() == "3 1 4 2 node3 20007\n"
    assert jobs.ending() is None


def test_a_task_does_not_start_the_rank_of_a_cancelled_run(jobs, start, tmp_path):
    jobs.write_file(jobs.folder.cancel, "")
    assert start("touch started; exit 2").wait(60) == 0
    assert not (tmp_path / "started").exists()
    assert jobs.ending() is None


@pytest.mark.parametrize(
    ("script", "code", "again", "reason"),
    [
        ("exit 75", 0, True, "a rank died or stalled, or asked to be started again"),
        ("kill -KILL $$", 137, True, "ended by signal 9"),
        ("echo; echo dskd: wrong; echo; exit 2", 2, False, "exit code 2, dskd: wrong"),
    ],
)
def test_a_task_tells_how_its_rank_ended(jobs, start, script, code, again, reason):
    assert start(script).wait(60) == code
    ending = jobs.ending()
    assert ending.again is again
    assert ending.reason.startswith("rank 3 on ")
    assert ending.reason.endswith(f": {reason}")


def test_what_the_first_rank_told_of_its_end_stays(jobs, start):
    first = Ending(False, "rank 0 on node3: exit code 1")
    jobs.mark_ending(first)
    assert start("exit 75").wait(60) == 0
    assert jobs.ending() == first


@pytest.mark.parametrize("name", ["USR2", "TERM"])
def test_a_signal_to_a_task_reaches_its_rank(slurm, jobs, start, tmp_path, name):
    started = start(f"trap 'echo > got; exit 75' {name}; echo > ready; {WAIT}")
    slurm.until((tmp_path / "ready").exists)
    started.send_signal(signal.Signals[f"SIG{name}"])
    assert started.wait(60) == 0
    assert (tmp_path / "got").exists()
    assert jobs.ending() == Ending(True, ASKED)


def write_rank(slurm, script: str) -> None:
    rank = slurm.folder / "rank"
    rank.write_text(f"#!/bin/sh\ncd {slurm.folder}\n{script}\n")
    rank.chmod(0o755)


def test_a_preempted_run_comes_to_its_end_by_itself(slurm, run):
    """From `dskd submit` through the batch script, submitit and both ranks, twice."""
    wait = f"trap 'exit 75' USR2; echo > ready$RANK; {WAIT}"
    write_rank(slurm, f'echo "start $DSKD_START, rank $RANK: $*"; [ $DSKD_START = 2 ] && exit 0\n{wait}')
    (directory,) = submit(run, "--cluster", slurm.profile(), "launch.processes=2")
    slurm.start("101")
    slurm.until(lambda: all((slurm.folder / f"ready{rank}").exists() for rank in (0, 1)))
    subprocess.run(["scancel", "--signal=USR2", "101"], check=True)
    slurm.wait("101")
    assert slurm.state("101") == "PENDING"
    slurm.start("101")
    assert slurm.wait("101") == 0
    assert outcomes(directory) == [("again", "preempted"), ("finished", "")]
    shown = typed("status", directory)
    assert "\n  job 101 finished on node1\n" in shown
    assert shown.endswith("  started again 1 times: preempted\n")
    for rank in (0, 1):
        lines = [f"start {start}, rank {rank}: -m dskd train {directory}/job/run.yaml\n" for start in (1, 2)]
        assert [log.read_text() for log in Jobs.at(directory).folder.logs(rank)] == lines


def test_a_cancelled_run_saves_its_state_and_can_be_resumed(slurm, run):
    stop = "trap 'ls -d cancelled/job/cancel; exit 75' USR2"
    write_rank(slurm, f"cd outputs/*/*; {stop}; echo > ready; {WAIT}")
    (directory,) = submitted(run, "--cluster", slurm.profile(), "output.name=cancelled")
    slurm.start("101")
    slurm.until((directory.parent / "ready").exists)
    typed("cancel", directory)
    slurm.wait("101")
    assert outcomes(directory) == [("cancelled", "cancelled; state at step 0")]
    assert slurm.state("101") == "CANCELLED"
    assert dskd("logs", directory) == "cancelled/job/cancel\n"  # the mark is there before the signal is
    assert typed("resume", directory).startswith("job 102: ")
    assert slurm.options("102") == slurm.options("101")
    assert not Jobs.at(directory).is_cancelled()


def test_a_failing_rank_ends_its_job_and_is_told(slurm, run):
    write_rank(slurm, f"[ $RANK = 1 ] && {{ echo dskd: wrong; exit 2; }}\n{WAIT}")
    (directory,) = submitted(run, "--cluster", slurm.profile(), "launch.processes=2")
    slurm.start("101")
    assert slurm.wait("101") != 0
    assert "\n  job 101 failed on node1 (rank 1 on " in (shown := typed("status", directory))
    assert "exit code 2, dskd: wrong)\n" in shown
    assert slurm.calls("scontrol") == []


def test_a_job_that_may_not_begin_starts_no_rank(slurm, run):
    write_rank(slurm, "touch started")
    (directory,) = submitted(run, "--cluster", slurm.profile(max_requeues=0))
    slurm.change("101", restarts=1)
    slurm.start("101")
    assert slurm.wait("101") == 1
    assert statuses([directory])[0].state == "failed"
    assert len(slurm.calls("srun")) == 1  # which looks whether the nodes see the folder
    assert not (slurm.folder / "started").exists()
