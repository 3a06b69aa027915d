"""`dskd submit` and `dskd resume` as typed, with programs in the place of Slurm's that keep a queue of their own."""

import json
import stat
import subprocess
import sys

import pytest
from support.cluster import submit
from support.fake_slurm import submitted, typed

from dskd.config.load import load_run
from dskd.launch import slurm as commands
from dskd.rundir.jobs import Jobs


def mode(path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def job_id(directory) -> str:
    return Jobs.at(directory).read().id


def array_files(run, count):
    files = [run.with_name(f"seed{seed}.yaml") for seed in range(count)]
    for file in files:
        file.write_text(f"extends: run.yaml\noutput: {{name: {file.stem}}}\n")
    return files


def finish_run(directory) -> None:
    """What a run leaves that has made its last step."""
    state = directory / "resume" / "step5"
    state.mkdir(parents=True)
    (state / "state.json").write_text(json.dumps({"format": 1, "world_size": 1, "step": 5, "finished": True}))
    (state.parent / "LATEST").write_text("step5\n")
    (directory / "run.yaml").write_text((directory / "job/run.yaml").read_text())


def test_a_run_is_submitted_and_its_directory_tells_how(slurm, run):
    profile = slurm.profile(cpus_per_node=6, account="physics", sbatch={"begin": "now+1hour"}, environment={"A": "b c"})
    (directory,) = submit(run, "--cluster", profile, "launch.nodes=2", "launch.hours=2")
    jobs = Jobs.at(directory)
    job = jobs.read()
    assert (job.id, job.cluster, job.nodes, job.tasks_per_node, job.minutes) == ("101", "mine", 2, 1, 120)
    assert job.command == (str(slurm.folder / "rank"), "-m", "dskd", "train", str(jobs.folder.settings))
    assert load_run(jobs.folder.settings).launch.nodes == 2
    assert slurm.state("101") == "PENDING"
    expected = {"nodes": "2", "ntasks-per-node": "1", "cpus-per-task": "6", "time": "120", "partition": "low"}
    expected |= {"account": "physics", "begin": "now+1hour", "signal": "USR2@30", "requeue": "", "open-mode": "append"}
    expected |= {"job-name": "dskd-default"}
    options = slurm.options("101")
    assert {name: options.get(name) for name in expected} == expected
    assert not {"dependency", "array", "gpus-per-node"} & set(options)
    assert "\nexport A='b c'\n" in slurm.queue.script("101").read_text()
    assert (jobs.folder.submitit / "101_submitted.pkl").is_file()


def test_what_a_submission_writes_is_for_the_user_alone(slurm, run):
    (directory,) = submitted(run, "--cluster", slurm.profile(environment={"TOKEN": "secret"}))
    job = Jobs.at(directory).folder
    written = (job.submission, job.settings, job.cluster, job.script)
    assert [mode(file) for file in written] == [0o600] * 4
    assert [mode(folder) for folder in (job.path, job.submitit)] == [0o700] * 2
    assert "secret" in job.script.read_text()


def test_each_run_of_an_array_has_its_own_id(slurm, run):
    directories = submitted(*array_files(run, 3), "--cluster", slurm.profile(), "--parallel", 2)
    assert [directory.name for directory in directories] == ["seed0", "seed1", "seed2"]
    assert [job_id(directory) for directory in directories] == ["101_0", "101_1", "101_2"]
    assert slurm.options("101")["array"] == "0-2%2"
    (runs,) = (directories[0].parent / "arrays").glob("*/runs.txt")
    assert runs.read_text().splitlines() == [str(directory) for directory in directories]
    assert mode(runs.parent) == 0o700
    assert len(slurm.calls("sbatch")) == 1


def test_a_refusal_is_told_in_one_line_and_leaves_nothing_of_a_new_run(slurm, run):
    slurm.tell(answers=["Batch job submission failed: Invalid qos specification"])
    line = typed("submit", run, "--cluster", slurm.profile(qos="high"), code=2)
    words = "sbatch refused: Batch job submission failed: Invalid qos specification"
    assert line == f"dskd: {words}; change qos (cluster profile)"
    assert not list(run.parent.rglob("job.json"))
    assert slurm.jobs() == {}


@pytest.mark.parametrize("count", [1, 2])
def test_after_a_refusal_what_was_known_of_earlier_submissions_is_known_still(slurm, run, count):
    files = array_files(run, count)
    directories = submitted(*files, "--cluster", slurm.profile())
    for id_ in slurm.jobs():
        slurm.change(id_, state="COMPLETED")
    before = [Jobs.at(directory).read() for directory in directories]
    slurm.tell(answers=["Batch job submission failed: Node count specification invalid"])
    line = typed("submit", *files, "--cluster", slurm.profile(), "launch.hours=3", code=2)
    assert line.startswith("dskd: sbatch refused: ")
    assert [Jobs.at(directory).read() for directory in directories] == before
    assert all(job.minutes == 60 and job.id for job in before)


def test_after_a_refusal_a_run_is_resumed_as_it_was_submitted_before(slurm, run):
    """The profile, the settings and the script of a submission that came to nothing are forgotten with it."""
    (directory,) = submitted(run, "--cluster", slurm.profile(account="first"))
    slurm.change("101", state="COMPLETED")
    files = Jobs.at(directory).folder.submitted
    before = [file.read_text() for file in files]
    slurm.tell(answers=["Batch job submission failed: Invalid account"])
    typed("submit", run, "--cluster", slurm.profile(account="second"), "train.lr=1e-5", code=2)
    assert [file.read_text() for file in files] == before


@pytest.mark.parametrize("state", ["PENDING", "RUNNING", "COMPLETING"])
def test_a_run_that_is_in_the_queue_is_not_submitted_again(slurm, run, state):
    (directory,) = submitted(run, "--cluster", slurm.profile())
    slurm.change("101", state=state)
    before = Jobs.at(directory).read()
    line = typed("submit", run, "--cluster", slurm.profile(), code=2)
    assert line == f"dskd: {directory} is in the queue already, as job 101; `dskd cancel` ends it"
    assert Jobs.at(directory).read() == before
    assert list(slurm.jobs()) == ["101"]


def test_an_element_of_an_array_is_refused_while_another_that_has_ended_is_not(slurm, run):
    files = array_files(run, 2)
    directories = submitted(*files, "--cluster", slurm.profile())
    slurm.change("101_0", state="COMPLETED")
    assert submitted(files[0], "--cluster", slurm.profile()) == directories[:1]
    assert "as job 101_1;" in typed("submit", files[1], "--cluster", slurm.profile(), code=2)
    assert (job_id(directories[0]), job_id(directories[1])) == ("102", "101_1")


def test_of_two_who_submit_at_once_one_is_told(slurm, run):
    held = slurm.hold()
    command = [sys.executable, "-m", "dskd", "submit", str(run), "--cluster", str(slurm.profile())]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    slurm.until(held.exists)
    line = typed(*command[3:], code=2)
    assert line.startswith("dskd: ")
    assert line.endswith("/default is being submitted at this moment")
    held.unlink()
    out, _ = first.communicate(timeout=60)
    assert out.startswith("job 101: ")
    assert list(slurm.jobs()) == ["101"]


def test_a_controller_that_answers_late_is_asked_again(slurm, run, monkeypatch):
    monkeypatch.setattr(commands, "WAIT", 0.0)
    slurm.tell(down=2)
    (directory,) = submitted(run, "--cluster", slurm.profile())
    assert job_id(directory) == "101"
    assert len(slurm.calls("sbatch")) == 3


def test_a_run_that_has_not_begun_is_resumed_with_the_profile_and_settings_it_was_submitted_with(slurm, run):
    (directory,) = submitted(run, "--cluster", slurm.profile(partition="old"), "train.max_steps=9")
    slurm.change("101", state="CANCELLED")
    Jobs.at(directory).folder.cancel.touch()
    slurm.profile(partition="new")
    assert typed("resume", directory, "train.lr=0.5") == f"job 102: {directory}\n"
    assert slurm.options("102")["partition"] == "old"
    job = Jobs.at(directory).read()
    assert (job.id, job.cluster) == ("102", "mine")
    settings = load_run(Jobs.at(directory).folder.settings)
    assert (settings.train.max_steps, settings.train.lr) == (9, 0.5)
    assert not Jobs.at(directory).is_cancelled()


def test_a_run_that_has_begun_is_resumed_as_it_ran_last(slurm, run):
    (directory,) = submitted(run, "--cluster", slurm.profile(), "train.max_steps=9")
    slurm.change("101", state="FAILED")
    settings = (directory / "job/run.yaml").read_text()
    (directory / "run.yaml").write_text(settings.replace("max_steps: 9", "max_steps: 11"))
    typed("resume", directory, "--force")
    assert load_run(directory / "job/run.yaml").train.max_steps == 11
    assert Jobs.at(directory).read().command[-2:] == (str(directory / "job/run.yaml"), "--force")


def test_a_run_in_the_queue_is_not_resumed(slurm, run):
    (directory,) = submitted(run, "--cluster", slurm.profile())
    assert "is in the queue already, as job 101" in typed("resume", directory, code=2)
    assert list(slurm.jobs()) == ["101"]


def test_a_finished_run_is_resumed_only_with_other_settings(slurm, run):
    (directory,) = submitted(run, "--cluster", slurm.profile())
    slurm.change("101", state="COMPLETED")
    finish_run(directory)
    assert typed("resume", directory, code=2) == f"dskd: {directory}: this run is finished already"
    assert list(slurm.jobs()) == ["101"]
    typed("resume", directory, "train.epochs=9")
    assert job_id(directory) == "102"


def test_what_fits_is_told_in_a_line_and_what_does_not_is_refused(slurm, run):
    small, large = (slurm.profile(gpus_per_node=2, gpu_memory_gb=memory) for memory in (0.5, 80))
    assert small == large
    told = typed("submit", run, "--cluster", large, "--dry-run").splitlines()[0]
    assert told.startswith("fits: 1.")
    assert " of 80.0 GB a GPU; " in told
    slurm.profile(gpus_per_node=2, gpu_memory_gb=0.5)
    line = typed("submit", run, "--cluster", small, code=2)
    assert line.startswith("dskd: does not fit: 1.")
    assert slurm.jobs() == {}
    assert typed("submit", run, "--cluster", small, "--force").startswith("does not fit: ")
    assert slurm.state("101") == "PENDING"
