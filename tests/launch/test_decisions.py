"""Who is started again and why: what a rank's end means, what the batch script makes of it, what Slurm's words mean."""

import json
import signal
from pathlib import Path

import pytest

from dskd.config.errors import UserError
from dskd.launch import slurm
from dskd.launch.batch import SLURM_SIGNALS_EARLY, finish, why_not_again, why_stopped
from dskd.launch.task import ASKED, again_reason
from dskd.rundir.jobs import Ending, Job, Jobs
from dskd.rundir.read import is_complete, read_rougel
from dskd.rundir.shard import ShardProgress, write_shard

JOB = Job("local", ("true",), 2, 2, minutes=60, signal_seconds=300, max_requeues=3, id="7")


@pytest.fixture
def jobs(tmp_path):
    jobs = Jobs.at(tmp_path)
    jobs.write(JOB)
    return jobs


def state(jobs: Jobs, step: int, finished: bool = False) -> None:
    folder = jobs.directory.path / "resume" / f"step{step}"
    folder.mkdir(parents=True)
    about = {"format": 1, "world_size": 1, "step": step, "finished": finished}
    (folder / "state.json").write_text(json.dumps(about))
    (folder.parent / "LATEST").write_text(f"step{step}\n")


@pytest.mark.parametrize(
    ("code", "asked", "reason"),
    [
        (75, True, ASKED),
        (-signal.SIGUSR2, True, ASKED),  # before the rank could handle it
        (128 + signal.SIGTERM, True, ASKED),  # the same, in a container
        (75, False, "a rank died or stalled, or asked to be started again"),
        (-signal.SIGKILL, False, "ended by signal 9"),
        (137, True, "ended by signal 9"),
        (1, True, None),
        (2, False, None),
    ],
)
def test_what_the_end_of_a_rank_means(code, asked, reason):
    assert again_reason(code, asked) == reason


def test_a_run_that_was_asked_to_stop_early_was_preempted():
    late = JOB.minutes * 60 - JOB.signal_seconds
    assert why_stopped(ASKED, JOB, late - SLURM_SIGNALS_EARLY - 1) == "preempted"
    assert why_stopped(ASKED, JOB, late - SLURM_SIGNALS_EARLY + 1) == "time limit"
    assert why_stopped("rank 1: ended by signal 9", JOB, 5) == "rank 1: ended by signal 9"


@pytest.mark.parametrize(
    ("before", "reason", "again"),
    [
        ("time limit", "time limit", False),
        ("rank 0 on node1: ended by signal 9", "time limit", False),
        ("preempted", "time limit", True),
        ("time limit", "preempted", True),
    ],
)
def test_two_starts_without_progress_are_enough_unless_the_run_was_preempted(jobs, before, reason, again):
    state(jobs, 40)
    jobs.add_start("7", "node1")
    assert why_not_again(jobs, JOB, reason) is None
    jobs.end_start(1, "again", before)
    jobs.add_start("7", "node2")
    problem = why_not_again(jobs, JOB, reason)
    assert (problem is None) == again
    assert again or "two starts in a row made no progress: state at step 40" in problem


def test_after_progress_a_run_is_started_again(jobs):
    state(jobs, 40)
    jobs.add_start("7", "node1")
    jobs.end_start(1, "again", "time limit")
    jobs.add_start("7", "node1")
    state(jobs, 41)
    assert why_not_again(jobs, JOB, "time limit") is None


def test_records_of_a_shard_are_progress(jobs):
    for made, again in ((5, True), (9, True), (9, True), (9, False)):  # the third start began after 9
        jobs.add_start("7", "node1")
        write_shard(jobs.directory, ShardProgress(Path("cache"), Path("train.jsonl"), "", "", 20, made))
        problem = why_not_again(jobs, JOB, "time limit")
        assert (problem is None) == again
        jobs.end_start(len(jobs.starts()), "again", "time limit")
    assert problem.startswith("time limit; two starts in a row made no progress: 9 of 20 records; ")


def test_answers_of_an_evaluation_are_progress(jobs):
    for made, again in ((5, True), (9, True), (9, True), (9, False)):
        jobs.add_start("7", "node1")
        lines = ['{"identity": "x"}', *["{}"] * made, '{"torn": ']
        (jobs.directory.path / "answers.partial.jsonl").write_text("\n".join(lines))
        problem = why_not_again(jobs, JOB, "time limit")
        assert (problem is None) == again
        jobs.end_start(len(jobs.starts()), "again", "time limit")
    assert problem.startswith("time limit; two starts in a row made no progress: 9 answers; ")


def test_an_evaluation_that_was_made_up_for_is_progress(jobs):
    for name in ("step40-before-evaluation", "step40"):
        (jobs.directory.path / "resume").mkdir(exist_ok=True)
        (jobs.directory.path / "resume" / "LATEST").write_text(f"{name}\n")
        jobs.add_start("7", "node1")
        jobs.end_start(len(jobs.starts()), "again", "time limit")
        assert jobs.state_step() == 40
    jobs.add_start("7", "node1")
    (jobs.directory.path / "resume" / "LATEST").write_text("step40-before-evaluation\n")
    assert why_not_again(jobs, JOB, "time limit") is None


def test_a_run_is_not_started_again_for_ever(jobs, monkeypatch):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    jobs.add_start("7", "node1")
    assert "started again 3 times already" in why_not_again(jobs, JOB, "preempted")


def test_the_first_rank_that_did_not_finish_tells_why(jobs, capsys):
    jobs.add_start("7", "node[1-2]")
    jobs.mark_ending(Ending(False, "rank 1 on node1: exit code 1, ValueError: broken"))
    jobs.mark_ending(Ending(True, ASKED))  # Slurm ended the other ranks after that
    assert finish(jobs, 1) == 1
    assert jobs.starts()[-1].outcome == "failed"
    assert capsys.readouterr().err == "dskd: rank 1 on node1: exit code 1, ValueError: broken\n"


def test_a_start_that_never_told_its_end_was_lost(jobs):
    jobs.add_start("7", "node1")
    state(jobs, 5)
    jobs.add_start("7", "node2")
    jobs.end_start(2, "finished", "")
    with jobs.folder.starts.open("a") as torn:
        torn.write('{"number": 3, "jo')
    assert [(s.number, s.outcome, s.step) for s in jobs.starts()] == [(1, "lost", 0), (2, "finished", 5)]


def test_a_complete_run_or_evaluation_is_recognised(jobs):
    assert not is_complete(jobs.directory)
    state(jobs, 10)
    assert not is_complete(jobs.directory)
    state(jobs, 20, finished=True)
    assert is_complete(jobs.directory)
    assert jobs.state_step() == 20
    evaluation = Jobs.at(jobs.directory.path / "eval" / "dev" / "seed1")
    evaluation.directory.path.mkdir(parents=True)
    assert not is_complete(evaluation.directory)
    (evaluation.directory.path / "results.json").write_text('{"rougel": {"mean": 12.5}}')
    assert is_complete(evaluation.directory)
    assert read_rougel(evaluation.directory.path) == 12.5


@pytest.mark.parametrize(
    ("said", "key"),
    [
        ("sbatch: error: invalid partition specified: gppu\nsbatch: error: Batch job submission failed", "partition"),
        ("sbatch: error: Batch job submission failed: Invalid account or account/partition combination", "account"),
        ("sbatch: error: Batch job submission failed: Invalid qos specification", "qos"),
        ("sbatch: error: Batch job submission failed: Requested time limit is invalid", "hours"),
        ("sbatch: error: Batch job submission failed: Invalid feature specification", "constraint"),
        ("sbatch: error: Batch job submission failed: Requested node configuration is not available", "launch.nodes"),
    ],
)
def test_a_refusal_has_sbatch_s_words_and_the_key_to_change(said, key):
    line = str(slurm.refused(said))
    assert "\n" not in line
    assert line.startswith(f"sbatch refused: {said.splitlines()[0].removeprefix('sbatch: error: ')}")
    assert f"; change {key}" in line


def test_a_controller_that_does_not_answer_is_asked_again_with_a_limit(monkeypatch):
    monkeypatch.setattr(slurm, "WAIT", 0.0)
    asked = []

    def call() -> str:
        asked.append(1)
        raise slurm.Unreachable("Unable to contact slurm controller (connect failure)")

    with pytest.raises(UserError, match=r"does not answer \(Unable to contact .*\); tried 4 times"):
        slurm.patiently(call)
    assert len(asked) == slurm.ATTEMPTS
