"""The whole experiment of jobs/paper_small.yaml, not run: each of its jobs is read and checked."""

import sys
from collections import Counter
from pathlib import Path

import pytest

from dskd.config.cluster import ClusterConfig
from dskd.config.methods import MethodConfig
from dskd.config.recipes import recipes_folder
from dskd.launch.pipeline import read_pipeline, would_run, would_submit

FILE = recipes_folder() / "paper_small.yaml"
ONE = {"sft", "kd", "dskd", "dskd_v2"}
TWO = {"sft", "uld", "mined", "dskd_cma", "dskd_v2_eta"}


@pytest.fixture
def stages(tiny, tmp_path, monkeypatch):
    """Read where the quick start has left its models; tiny ones stand for them."""
    models = tmp_path / "outputs" / "quickstart"
    models.mkdir(parents=True)
    (models / "teacher").symlink_to(tiny("llama"))
    (models / "tokenizer").symlink_to(tiny("mistral"))
    (models / "records").symlink_to(FILE.parent / "quickstart")
    monkeypatch.chdir(tmp_path)
    return {stage.name: stage for stage in read_pipeline(FILE, ClusterConfig(cpus_per_node=1))}


def test_it_trains_all_methods_of_both_groups_with_two_seeds_and_evaluates_them_with_three(stages):
    trained = {name: stage for name, stage in stages.items() if stage.run is not None}
    teacher = trained.pop("teacher")
    for student, methods in (("small", ONE), ("small_mistral", TWO)):
        healed = trained.pop(student.replace("small", "healed"))
        assert healed.run.student.path == stages[student].best
        assert healed.run.data.train in stages["texts"].texts
        own = [stage for stage in trained.values() if stage.run.student.path == healed.best]
        assert {stage.run.method.kind for stage in own} == methods
    assert len(trained) == len(ONE) + len(TWO)
    assert {stage.run.method.kind for stage in trained.values()} == set(MethodConfig.kinds)
    for name, stage in trained.items():
        assert [request.directory.name for request in stage.requests] == [f"{name}-seed10", f"{name}-seed20"]
        assert stage.run.teacher is None or stage.run.teacher.path == teacher.best
        assert stage.run.teacher is None or (stage.run.teacher.backend == "cache" and "states" in stage.needs)
        scores = stages[f"scores_{name}"]
        assert [request.directory.parents[1] for request in scores.requests] == [r.directory for r in stage.requests]
        assert all("10,20,30" in request.command for request in scores.requests)
    assert set(stages["report"].needs) == {*trained, *(f"scores_{name}" for name in trained)}


def test_all_trainings_are_of_one_size(stages):
    runs = [stage.run for stage in stages.values() if len(stage.requests) == 2 and stage.run is not None]
    sizes = Counter((run.data, run.train.epochs, run.train.global_batch_size, run.train.lr) for run in runs)
    assert len(sizes) == 1


def test_its_dry_run_here_and_under_slurm(stages):
    here = "\n".join(would_run(list(stages.values())))
    assert here.count(" train ") == 2 * (len(ONE) + len(TWO)) + 3
    assert here.count(" evaluate ") == 2 * (len(ONE) + len(TWO)) + 1
    assert here.count(" generate ") == 1
    assert here.count(" student ") == 2
    assert here.splitlines()[-1].startswith(f"{sys.executable} -m dskd report ")
    submitted = "\n".join(would_submit(list(stages.values()), ClusterConfig(cpus_per_node=1)))
    assert submitted.count("#!/bin/bash\n") == len(stages)
    assert "#SBATCH --dependency=afterok:" in submitted
    assert [path.name for path in Path("outputs").iterdir()] == ["quickstart"]
