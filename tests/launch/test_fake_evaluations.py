"""`dskd evaluate --jobs`, with programs in the place of Slurm's that keep a queue of their own."""

import shutil

import pytest
from support.cluster import dskd
from support.tiny import varied_records, write_records

from dskd.config.suites import SUITES
from dskd.rundir.jobs import Jobs


@pytest.fixture
def model(tiny, tmp_path):
    return shutil.copytree(tiny("llama"), tmp_path / "model")


@pytest.fixture
def options(slurm, tmp_path):
    for file in SUITES["paper"].values():
        (tmp_path / "data" / file).parent.mkdir(parents=True, exist_ok=True)
        write_records(tmp_path / "data" / file, varied_records(1))
    root = ("--suite", "paper", "--data-root", tmp_path / "data", "--seeds", "1,2")
    return (*root, "--max-length", "64", "--max-prompt-length", "32", "--jobs", slurm.profile())


def test_each_set_with_each_seed_is_a_job_of_one_array_until_it_is_complete(slurm, model, options, tmp_path):
    assert dskd("evaluate", model, *options) == f"jobs 101_0 to 101_9: {model}/eval\n"
    folders = [model / "eval" / name / f"seed{seed}" for name in SUITES["paper"] for seed in (1, 2)]
    for index, folder in enumerate(folders):
        job = Jobs.at(folder).read()
        assert job.id == f"101_{index}"
        assert job.command[3:5] == ("evaluate", str(model))
        assert job.command[job.command.index("--output") + 1] == str(folder)
        assert "--max-length=64" in job.command
    assert dskd("evaluate", model, *options).startswith("in the queue already as 101_0, 101_1, ")
    (folders[3] / "results.json").write_text('{"rougel": {"mean": 12.5}}')
    for index in range(9):
        slurm.change(f"101_{index}", state="COMPLETED")
    said = dskd("evaluate", model, *options)
    assert said == f"jobs 102_0 to 102_7, in the queue already as 101_9, 1 of 10 complete already: {model}/eval\n"


def test_a_dry_run_shows_the_jobs_and_greedy_ones_have_one_seed(slurm, model, options):
    said = dskd("evaluate", model, *options, "--greedy", "--dry-run")
    assert said.count("each rank runs") == 5
    assert said.count("--greedy") == 5
    assert slurm.calls("sbatch") == []
    assert not (model / "eval").exists()
