"""`dskd status` and `dskd cancel`, with programs in the place of Slurm's that keep a queue of their own."""

import json

import pytest
from support.cluster import dskd
from support.fake_slurm import submitted, typed

from dskd.launch import slurm as commands
from dskd.launch.status import statuses
from dskd.rundir.jobs import LOST, Jobs


@pytest.fixture
def directory(slurm, run):
    """Of a run that is pending, as job 101."""
    (directory,) = submitted(run, "--cluster", slurm.profile())
    return directory


def begin(directory, id_: str = "101") -> None:
    Jobs.at(directory).add_start(id_, "node1")


def end(directory, outcome: str, reason: str = "") -> None:
    jobs = Jobs.at(directory)
    jobs.end_start(len(jobs.starts()), outcome, reason)


def save_state(directory, step: int) -> None:
    (directory / "resume").mkdir(exist_ok=True)
    (directory / "resume" / "LATEST").write_text(f"step{step}\n")


def make_steps(directory, count: int, total: int) -> None:
    """The first ten steps are slow, those after them change between two speeds."""
    (directory / "args.json").write_text(json.dumps({"length": {"total_steps": total, "steps_per_epoch": 5}}))
    with (directory / "metrics.jsonl").open("w") as metrics:
        for step in range(1, count + 1):
            speed, seconds = (100, 9.0) if step <= 10 else (1000 + 1000 * (step % 2), 3.0)
            line = {"step": step, "loss": 2.0, "tokens_per_second": speed, "seconds": seconds}
            metrics.write(json.dumps(line) + "\n" + json.dumps({"step": step, "dev_loss": 2.0}) + "\n")


def test_a_pending_run_tells_what_it_waits_for(slurm, directory):
    slurm.change("101", reason="Resources")
    expected = f"{directory}\n  job 101 pending (Resources)\n  step 0, no state yet\n"
    assert typed("status", directory) == expected


def test_a_running_run_tells_its_node_its_speed_and_when_it_will_be_done(slurm, directory):
    slurm.run("101")
    begin(directory)
    make_steps(directory, 30, total=44)
    save_state(directory, 25)
    shown = typed("status", directory).splitlines()
    assert shown[1:] == [
        "  job 101 running on node1",
        "  step 30/44, 1500 tokens/s, about 0.7 min left, last state at step 25",
    ]
    (status,) = statuses([directory])
    assert (status.step, status.total_steps, status.seconds_left) == (30, 44, 42.0)


def test_a_run_that_was_started_again_tells_why(slurm, directory):
    slurm.run("101")
    begin(directory)
    end(directory, "again", "preempted")
    begin(directory)  # and nothing wrote down how this one ended
    begin(directory)
    end(directory, "again", "time limit")
    begin(directory)
    shown = typed("status", directory).splitlines()
    assert shown[1] == "  job 101 running on node1"
    assert shown[3] == f"  started again 3 times: preempted, {LOST}, time limit"


def test_a_requeued_run_is_pending(slurm, directory):
    begin(directory)
    end(directory, "again", "preempted")
    slurm.change("101", reason="BeginTime")
    (status,) = statuses([directory])
    assert (status.state, status.note, status.restarts) == ("pending", "BeginTime", ("preempted",))


@pytest.mark.parametrize("outcome", ["finished", "failed", "cancelled"])
def test_what_a_run_wrote_down_of_its_end_needs_no_slurm(slurm, directory, outcome):
    begin(directory)
    make_steps(directory, 44, total=44)
    end(directory, outcome, "as the run says")
    slurm.forget("101", accounted=False)
    asked = len(slurm.calls("squeue"))
    shown = typed("status", directory).splitlines()
    assert shown[1:] == [
        f"  job 101 {outcome} on node1 (as the run says)",
        "  step 44/44, 1500 tokens/s, no state yet",
    ]
    assert len(slurm.calls("squeue")) == asked


def test_what_an_earlier_submission_came_to_is_not_the_state_of_this_one(slurm, directory):
    begin(directory, "77")
    end(directory, "failed", "exit code 1")
    (status,) = statuses([directory])
    assert (status.job, status.state) == ("101", "pending")


@pytest.mark.parametrize("remembered", [True, False])
@pytest.mark.parametrize(
    ("state", "told", "note"),
    [
        ("TIMEOUT", "failed", "TIMEOUT; it did not stop in time: a longer signal_seconds may help; state at step 8"),
        ("OUT_OF_MEMORY", "failed", "OUT_OF_MEMORY; state at step 8"),
        ("CANCELLED", "cancelled", "CANCELLED; state at step 8"),
    ],
)
def test_the_end_that_only_slurm_knows_is_told(slurm, directory, remembered, state, told, note):
    """By the controller as long as it remembers the job, then by accounting."""
    begin(directory)
    save_state(directory, 8)
    slurm.change("101", state=state, nodes="node1", reason="None")
    if not remembered:
        slurm.forget("101")
    (status,) = statuses([directory])
    assert (status.state, status.note, status.nodes) == (told, note, "node1")
    assert len(slurm.calls("sacct")) == (0 if remembered else 1)


def test_a_job_that_failed_before_its_first_line_is_told_with_what_it_said_last(slurm, directory):
    slurm.change("101", state="FAILED", nodes="node1")
    assert "FAILED before its first line on node1: is " in typed("status", directory)
    log = Jobs.at(directory).folder.submitit / "101_0_log.err"
    log.write_text("bash: warning\ndskd: the folder is not there\nsrun: error\n")
    assert "\n  job 101 failed on node1 (the folder is not there)\n" in typed("status", directory)


def test_a_job_that_waits_for_one_that_failed_is_told_as_cancelled(slurm, directory):
    slurm.change("101", state="CANCELLED", reason="DependencyNeverSatisfied")
    assert "\n  job 101 cancelled (CANCELLED: DependencyNeverSatisfied)\n" in typed("status", directory)


@pytest.mark.parametrize("accounting", [True, False])
def test_a_job_that_nobody_knows_is_gone(slurm, directory, accounting):
    begin(directory)
    slurm.forget("101", accounted=False)
    slurm.tell(accounting=accounting)
    (status,) = statuses([directory])
    note = "job 101 is neither in the queue nor in the accounting; last known: started on node1"
    assert (status.state, status.note) == ("gone", note)


def test_the_score_of_an_evaluation_stands_in_the_place_of_its_steps(slurm, directory):
    begin(directory)
    end(directory, "finished")
    (directory / "results.json").write_text('{"rougel": {"mean": 12.5}}')
    assert typed("status", directory).splitlines()[2] == "  ROUGE-L 12.50"


def test_without_a_name_all_submitted_runs_are_shown_and_slurm_is_asked_once(slurm, run, monkeypatch):
    for name in ("a", "b", "c"):
        submitted(run, "--cluster", slurm.profile(), f"output.name={name}")
    slurm.run("102")
    asked = len(slurm.calls("squeue"))
    monkeypatch.chdir(run.parent)
    shown = dskd("status").splitlines()
    assert [line.strip() for line in shown if "job " in line] == [
        "job 101 pending (Priority)",
        "job 102 running on node1",
        "job 103 pending (Priority)",
    ]
    assert shown[0] == "outputs/llama-pieces-untied/sft/a"
    assert len(slurm.calls("squeue")) == asked + 1


def test_a_running_run_is_asked_to_save_its_state_and_to_stop(slurm, directory):
    slurm.run("101")
    assert dskd("cancel", directory) == (
        f"job 101: asked to save its state and to stop; `dskd status {directory}` shows when it has\n"
    )
    assert Jobs.at(directory).is_cancelled()
    assert slurm.jobs()["101"]["signals"] == ["USR2"]
    assert slurm.state("101") == "RUNNING"


@pytest.mark.parametrize(("running", "options"), [(False, []), (True, ["--now"])])
def test_a_pending_run_and_one_that_shall_stop_at_once_leave_the_queue(slurm, directory, running, options):
    if running:
        slurm.run("101")
    assert typed("cancel", *options, directory) == "job 101: cancelled\n"
    assert slurm.state("101") == "CANCELLED"
    assert slurm.calls("scancel") == [["101"]]
    assert not Jobs.at(directory).is_cancelled()


def test_of_an_array_one_run_is_cancelled_and_the_others_stay(slurm, run):
    files = [run.with_name(f"seed{seed}.yaml") for seed in range(3)]
    for file in files:
        file.write_text(f"extends: run.yaml\noutput: {{name: {file.stem}}}\n")
    first, second, third = submitted(*files, "--cluster", slurm.profile())
    slurm.change("101_0", state="COMPLETED")
    slurm.run("101_1")
    shown = typed("cancel", first, second).splitlines()
    assert shown[0] == f"{first}: job 101_0 is not in the queue"
    assert shown[1].startswith("job 101_1: asked to save")
    assert [job["signals"] for job in slurm.jobs().values()] == [[], ["USR2"], []]
    typed("cancel", third)
    assert [job["state"] for job in slurm.jobs().values()] == ["COMPLETED", "RUNNING", "CANCELLED"]


def test_what_was_never_submitted_can_not_be_cancelled(slurm, directory):
    line = typed("cancel", directory.parent, code=2)
    assert line == f"dskd: {directory.parent}: not a submitted run (no job/job.json in it)"
    assert slurm.calls("scancel") == []


def test_a_job_that_left_the_queue_at_this_moment_is_told_as_gone_and_no_traceback(slurm, run, monkeypatch):
    (directory,) = submitted(run, "--cluster", slurm.profile())
    entry = {"101": commands.QueueEntry("PENDING", "", "Priority")}
    monkeypatch.setattr(commands, "queue", lambda ids: entry)  # what squeue said a moment ago
    slurm.forget("101")
    with slurm.queue.changed() as values:
        values["jobs"].clear()
    assert typed("cancel", directory) == "job 101: has left the queue by now\n"


def test_a_pending_job_that_was_cancelled_had_no_node(slurm, run):
    (directory,) = submitted(run, "--cluster", slurm.profile())
    slurm.change("101", state="CANCELLED")
    slurm.forget("101")
    assert "job 101 cancelled (CANCELLED)\n" in typed("status", directory)
