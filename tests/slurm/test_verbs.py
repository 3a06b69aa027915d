"""On a real cluster: what a run that cannot work costs, stopping and going on, chains of jobs, mistakes in one line."""

import json
import re
import shutil
import subprocess
from dataclasses import replace

import pytest
from ruamel.yaml import YAML
from support.cluster import DOWN, bring_up, dskd, outcomes, steps, submit, wait_for, wait_until

from dskd.launch import slurm as commands
from dskd.launch.status import statuses
from dskd.rundir.jobs import Jobs


@pytest.fixture(scope="module")
def run(slurm, make_run, tmp_path_factory):
    """A run of one rank."""
    settings = {"train": {"epochs": 8}, "method": {"kind": "sft"}, "launch": {"processes": 1}}
    return make_run(tmp_path_factory.mktemp("verbs"), **settings)


@pytest.fixture(scope="module")
def local(profile):
    return profile()


def test_a_run_that_fails_at_once_is_not_started_again(run, local, tmp_path):
    broken = tmp_path / "broken.jsonl"
    broken.write_text("no json\n")
    (directory,) = submit(run, "--cluster", local, f"data.train={broken}", "output.name=broken")
    wait_until(lambda: statuses([directory])[0].state == "failed", 120)
    ((outcome, reason),) = outcomes(directory)
    assert outcome == "failed"
    assert "rank 0 on node" in reason
    assert f"exit code 2, dskd: {broken}" in reason.replace("dskd: data.train: ", "dskd: ")
    assert reason in dskd("status", directory)
    assert str(broken) in dskd("logs", directory)


def test_a_cancelled_run_leaves_a_state_that_resume_continues(run, local):
    slow = ["train.micro_batch_size=1", "train.epochs=16", "eval.every_epochs=16"]
    (directory,) = submit(run, "--cluster", local, "output.name=cancelled", *slow)
    assert "is in the queue already" in dskd("submit", run, "--cluster", local, "output.name=cancelled", code=2)
    wait_for(directory, "running", step=5)
    assert "asked to save its state" in dskd("cancel", directory)
    status = wait_for(directory, "cancelled")
    assert 5 <= status.state_step < 80
    job, stopped = status.job, status.state_step
    wait_until(lambda: job not in commands.queue([job]), 60)
    assert commands.ended([job])[job].state.startswith("CANCELLED")
    assert "job " in dskd("resume", directory)
    assert wait_for(directory, "finished").step == 80
    assert Jobs.at(directory).starts()[-1].step == stopped
    assert steps(directory) == list(range(1, 81))
    assert "finished already" in dskd("resume", directory, code=2)


def test_a_pending_run_leaves_the_queue_at_once(run, profile):
    (directory,) = submit(run, "--cluster", profile(sbatch={"begin": "now+1hour"}), "output.name=pending")
    assert wait_for(directory, "pending").note == "BeginTime"
    assert dskd("cancel", directory).endswith(": cancelled\n")
    assert wait_for(directory, "cancelled").step == 0


def test_logs_can_be_followed_until_the_run_has_ended(run, local):
    (directory,) = submit(run, "--cluster", local, "output.name=followed", "train.max_steps=2")
    shown = dskd("logs", "--follow", directory)
    assert "2 steps of 8" in shown
    assert "finished: best model" in shown
    assert "ranks 0 to 0, got 1" in dskd("logs", "--rank", 1, directory, code=2)


def test_a_pipeline_trains_writes_distils_and_evaluates_and_repeats_nothing(run, local, tmp_path):
    root = run.parent
    pipeline = root / "pipeline.yaml"
    teacher = YAML(typ="safe", pure=True).load(run)["teacher"]["path"]
    pipeline.write_text(f"""
stages:
  scores:
    evaluate: student
    data: [{root}/dev.jsonl, {root}/train.jsonl]
    seeds: [1, 2]
    precision: fp32
    generation: {{max_length: 64, max_prompt_length: 32}}
    parallel: 2
  near: {{analyze: student, records: 4, precision: fp32}}
  student:
    run: run.yaml
    teacher: teacher
    settings: [method.kind=dskd_cma, train.max_steps=2, data.train={root}/texts.jsonl]
    after: [texts]
  texts:
    generate: {{data: {root}/train.jsonl, out: {root}/texts.jsonl}}
    teacher: teacher
    shards: 2
    precision: fp32
    generation: {{max_length: 40, max_prompt_length: 32}}
  teacher:
    run: run.yaml
    settings: ["student.path={teacher}", teacher=null, train.max_steps=2]
""")
    dskd("pipeline", pipeline, "--cluster", local)
    evaluations = root / "outputs/llama-pieces-untied/dskd_cma/student/eval"
    for directory in [evaluations / data / f"seed{seed}" for data in ("dev", "train") for seed in (1, 2)]:
        wait_for(directory, "finished")
        found = json.loads((directory / "results.json").read_text())
        assert found["checkpoint"].endswith("dskd_cma/student/best")
        assert f"\n  ROUGE-L {found['rougel']['mean']:.2f}\n" in dskd("status", directory)
    wait_for(evaluations / "analysis.job", "finished")
    assert json.loads((evaluations.parent / "analysis.json").read_text())["records"] <= 4
    card = json.loads((root / "texts.jsonl.card.json").read_text())
    assert (card["prompts"], card["records"]) == (40, len((root / "texts.jsonl").read_text().splitlines()))
    began = Jobs.at(evaluations.parent).starts()[0].time
    for share in ("00000-of-00002", "00001-of-00002"):
        assert Jobs.at(root / f"texts.jsonl.{share}.job").starts()[0].ended <= began
    again = dskd("pipeline", pipeline, "--cluster", local)
    assert "job " not in again
    assert "4 of 4 complete already" in again
    here = dskd("pipeline", pipeline, "--local")
    assert sorted(here.splitlines()) == [
        f"{name}: complete" for name in ("near", "scores", "student", "teacher", "texts")
    ]


def test_what_can_no_longer_run_is_cancelled(run, local, tmp_path):
    broken = tmp_path / "broken.jsonl"
    broken.write_text("no json\n")
    pipeline = run.parent / "broken.yaml"
    pipeline.write_text(f"""
stages:
  first: {{run: run.yaml, settings: [data.train={broken}]}}
  second: {{run: run.yaml, student: first}}
  third: {{evaluate: second, data: [{run.parent}/dev.jsonl], seeds: [1]}}
""")
    dskd("pipeline", pipeline, "--cluster", local)
    outputs = run.parent / "outputs/llama-pieces-untied/sft"
    for name in ("second", "third"):
        directory = outputs / ("second" if name == "second" else "second/eval/dev/seed1")
        wait_until(lambda d=directory: statuses([d])[0].state == "cancelled", 120)
        assert "DependencyNeverSatisfied" in dskd("status", directory) or name == "third"


def test_a_run_directory_that_the_nodes_do_not_share_is_found_out(run, local, slurm):
    (directory,) = submit(run, "--cluster", local, f"output.root={slurm}/scratch/outputs")
    wait_until(lambda: statuses([directory])[0].state == "failed", 60)
    assert f"is {directory} on storage that the nodes share?" in dskd("status", directory)


def test_a_folder_that_is_empty_on_the_nodes_is_found_out(run, local, slurm):
    for node in (slurm / "nodes").iterdir():
        (node / "there/llama-pieces-untied/sft/default/job/submitit").mkdir(parents=True)
    (directory,) = submit(run, "--cluster", local, f"output.root={slurm}/scratch/there")
    wait_until(lambda: statuses([directory])[0].state == "failed", 60)
    said = "".join(f.read_text() for f in slurm.glob("nodes/*/there/*/*/*/job/submitit/*_0_log.err"))
    assert f"dskd: {directory}/job/submitit is not on storage that all nodes share with the login node\n" in said


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"partition": "none"}, "sbatch refused: invalid partition specified: none; "),
        ({"hours": 48.0}, "sbatch refused: "),
        ({"constraint": "h100"}, "sbatch refused: "),
        ({"memory_gb": 100}, "sbatch refused: "),
    ],
)
def test_what_sbatch_refuses_is_told_in_its_words(run, profile, keys, expected):
    line = dskd("submit", run, "--cluster", profile(**keys), "output.name=refused", code=2)
    assert line.startswith(f"dskd: {expected}")
    assert f"change {next(iter(keys))}" in line
    assert len(line.splitlines()) == 1
    assert not list(run.parent.glob("outputs/*/*/refused/job/job.json"))


def test_a_job_that_nobody_remembers_is_told_as_gone(run, local):
    (directory,) = submit(run, "--cluster", local, "output.name=gone", "train.max_steps=1")
    jobs = Jobs.at(directory)
    dskd("cancel", "--now", directory)
    jobs.write(replace(jobs.read(), id="99999"))
    assert "job 99999 gone (job 99999 is neither in the queue nor in the accounting)" in dskd("status", directory)


def test_a_controller_that_is_down_is_told_in_one_line(run, local, slurm, tmp_path, monkeypatch):
    text = (slurm / "slurm.conf").read_text()
    (tmp_path / "slurm.conf").write_text(re.sub(r"SlurmctldPort=\d+", "SlurmctldPort=9", text))
    for name in ("gres.conf", "cgroup.conf"):
        shutil.copy(slurm / name, tmp_path)
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    line = dskd("submit", run, "--cluster", local, "output.name=down", code=2)
    assert line.startswith("dskd: the Slurm controller does not answer (")
    assert line.endswith("; tried 4 times")


def test_with_accounting_the_end_of_a_job_stays_known(run, local, tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("accounting")
    bring_up(folder, "--nodes", "1", "--accounting")
    monkeypatch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
    try:
        conf = folder / "slurm.conf"
        conf.write_text(conf.read_text().replace("MinJobAge=300", "MinJobAge=2"))
        subprocess.run(["scontrol", "reconfigure"], check=True)
        (directory,) = submit(run, "--cluster", local, f"output.root={folder}/scratch/outputs")
        job = Jobs.at(directory).read().id
        known = ["scontrol", "show", "job", job]
        wait_until(lambda: subprocess.run(known, capture_output=True).returncode != 0, 120)
        wait_until(lambda: statuses([directory])[0].state == "failed", 60)
        assert statuses([directory])[0].nodes == "node1"
    finally:
        subprocess.run([DOWN, "--folder", folder], check=True)
