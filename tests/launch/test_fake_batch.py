"""What the batch script runs before and after the ranks, with programs in the place of Slurm's."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest
from support.cluster import outcomes
from support.fake_slurm import submitted

from dskd.launch.status import statuses
from dskd.launch.task import ASKED
from dskd.rundir.jobs import Ending, Jobs


@pytest.fixture
def jobs(slurm, run):
    """Of a run that runs as job 101."""
    jobs = Jobs.at(*submitted(run, "--cluster", slurm.profile()))
    slurm.run("101")
    return jobs


def batch(slurm, id_: str, verb: str, *code: int):
    """What the batch script of a job runs, with what Slurm tells that script."""
    words = slurm.queue.script(id_).read_text().split(f"dskd.launch.batch {verb} ")[1]
    folder = re.match(r"[^\s)]+", words)[0]
    command = [sys.executable, "-m", "dskd.launch.batch", verb, folder, *map(str, code)]
    environment = os.environ | slurm.environment(id_)
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def save_state(jobs, step: int) -> None:
    jobs.directory.states.mkdir(exist_ok=True)
    jobs.directory.latest.write_text(f"step{step}\n")


def test_each_start_is_written_down_and_its_number_told(slurm, jobs):
    save_state(jobs, 7)
    jobs.mark_ending(Ending(True, "of an earlier start"))
    meetings = []
    for number in (1, 2):
        done = batch(slurm, "101", "begin")
        assert (done.returncode, done.stdout, done.stderr) == (0, f"{number}\n", "")
        meetings.append(jobs.meeting())
    assert [(start.number, start.job, start.nodes, start.step) for start in jobs.starts()] == [
        (1, "101", "node1", 7),
        (2, "101", "node1", 7),
    ]
    assert jobs.ending() is None
    assert meetings[0].secret != meetings[1].secret


def test_a_run_is_not_begun_more_often_than_the_profile_allows(slurm, jobs):
    slurm.change("101", restarts=3)
    assert batch(slurm, "101", "begin").returncode == 0
    slurm.change("101", restarts=4)
    done = batch(slurm, "101", "begin")
    reason = "started again 3 times (max_requeues of the cluster profile)"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"dskd: {reason}\n")
    assert outcomes(jobs.directory.path)[-1] == ("failed", reason)


def test_a_run_whose_directory_is_gone_ends_in_one_line(slurm, jobs):
    jobs.folder.submission.unlink()
    done = batch(slurm, "101", "begin")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.endswith("was the run directory deleted after it was submitted?\n")
    assert len(done.stderr.splitlines()) == 1


def test_a_finished_run_ends_its_job(slurm, jobs):
    jobs.add_start("101", "node1")
    assert batch(slurm, "101", "finish", 0).returncode == 0
    assert outcomes(jobs.directory.path) == [("finished", "")]
    assert (slurm.calls("scontrol"), slurm.calls("scancel")) == ([], [])


@pytest.mark.parametrize(
    ("ending", "code", "reason"),
    [
        (Ending(False, "rank 1 on node1: exit code 2, dskd: wrong"), 2, "rank 1 on node1: exit code 2, dskd: wrong"),
        (None, 137, "srun ended with 137"),
    ],
)
def test_after_a_failure_a_run_is_not_started_again(slurm, jobs, ending, code, reason):
    jobs.add_start("101", "node1")
    if ending:
        jobs.mark_ending(ending)
    done = batch(slurm, "101", "finish", code)
    assert (done.returncode, done.stderr) == (code, f"dskd: {reason}\n")
    assert outcomes(jobs.directory.path) == [("failed", reason)]
    assert slurm.calls("scontrol") == []


@pytest.mark.parametrize(
    ("told", "hours", "reason"),
    [
        (ASKED, 1, "preempted"),
        (ASKED, 2 / 60, "time limit"),
        ("rank 0 on node1: ended by signal 9", 1, "rank 0 on node1: ended by signal 9"),
    ],
)
def test_a_run_that_can_go_on_is_requeued(slurm, run, told, hours, reason):
    jobs = Jobs.at(*submitted(run, "--cluster", slurm.profile(), f"launch.hours={hours}"))
    slurm.run("101")
    jobs.add_start("101", "node1")
    jobs.mark_ending(Ending(True, told))
    done = batch(slurm, "101", "finish", 0)
    assert done.returncode == -signal.SIGKILL  # Slurm ends the script, which has nothing more to say
    assert outcomes(jobs.directory.path) == [("again", reason)]
    assert slurm.calls("scontrol") == [["requeue", "101"]]
    assert (slurm.state("101"), slurm.jobs()["101"]["restarts"]) == ("PENDING", 1)


def test_a_run_that_was_started_again_often_enough_is_not_requeued(slurm, jobs):
    slurm.change("101", restarts=3)
    jobs.add_start("101", "node1")
    jobs.mark_ending(Ending(True, ASKED))
    assert batch(slurm, "101", "finish", 0).returncode == 1
    reason = "preempted; started again 3 times already (max_requeues of the cluster profile)"
    assert outcomes(jobs.directory.path) == [("failed", reason)]
    assert slurm.calls("scontrol") == []


def test_a_requeue_that_slurm_refuses_is_a_failure_in_slurm_s_words(slurm, jobs):
    slurm.tell(requeue="Requested operation is presently disabled for job 101")
    jobs.add_start("101", "node1")
    jobs.mark_ending(Ending(True, ASKED))
    assert batch(slurm, "101", "finish", 0).returncode == 1
    (status,) = statuses([jobs.directory.path])
    assert status.state == "failed"
    assert status.note == "preempted; requeue refused: Requested operation is presently disabled for job 101"


@pytest.mark.parametrize("ending", [Ending(True, ASKED), Ending(False, "rank 0: exit code 1"), None])
def test_a_cancelled_run_leaves_the_queue_however_it_ended(slurm, jobs, ending):
    jobs.add_start("101", "node1")
    save_state(jobs, 6)
    jobs.folder.cancel.touch()
    if ending:
        jobs.mark_ending(ending)
    assert batch(slurm, "101", "finish", 0).returncode == 0
    assert outcomes(jobs.directory.path) == [("cancelled", "cancelled; state at step 6")]
    assert slurm.calls("scancel") == [["101"]]
    assert slurm.calls("scontrol") == []
    assert slurm.state("101") == "CANCELLED"


def test_a_run_that_was_cancelled_during_its_last_step_is_finished(slurm, jobs):
    jobs.add_start("101", "node1")
    save_state(jobs, 6)
    state = jobs.directory.states / jobs.state() / "state.json"
    state.parent.mkdir(exist_ok=True)
    state.write_text(json.dumps({"format": 1, "world_size": 1, "step": 6, "finished": True}))
    jobs.folder.cancel.touch()
    assert batch(slurm, "101", "finish", 0).returncode == 0
    assert outcomes(jobs.directory.path) == [("finished", "")]
    assert slurm.calls("scancel") == []


def test_an_element_of_an_array_is_a_run_of_its_own(slurm, run):
    files = [run.with_name(f"seed{seed}.yaml") for seed in range(2)]
    for file in files:
        file.write_text(f"extends: run.yaml\noutput: {{name: {file.stem}}}\n")
    first, second = submitted(*files, "--cluster", slurm.profile())
    slurm.run("101_1")
    assert batch(slurm, "101_1", "begin").stdout == "1\n"
    Jobs.at(second).mark_ending(Ending(True, ASKED))
    batch(slurm, "101_1", "finish", 0)
    assert slurm.calls("scontrol") == [["requeue", "101_1"]]
    assert (outcomes(first), outcomes(second)) == ([], [("again", "preempted")])
    assert [job["restarts"] for job in slurm.jobs().values()] == [0, 1]
