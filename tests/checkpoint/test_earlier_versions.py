"""What earlier versions wrote: a run of the first format of states goes on, its model loads, its jobs are read.

golden/run_format_1 is a run on two ranks under ZeRO-2 that was stopped at step 6, and the metrics of the same run left
alone, both written by the version before `dskd.rundir`.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch

from dskd.models.load import load_checkpoint
from dskd.rundir.jobs import Jobs
from dskd.rundir.layout import RunDirectory
from dskd.rundir.read import newest_state, read_run, read_steps, read_train_state
from dskd.train import train

GOLDEN = Path(__file__).parents[1] / "golden" / "run_format_1"


@pytest.fixture
def directory(tmp_path):
    root = Path(shutil.copytree(GOLDEN, tmp_path / "run"))
    for file in root.rglob("*"):
        if file.suffix in (".yaml", ".json") and "ROOT" in file.read_text():
            file.write_text(file.read_text().replace("ROOT", str(root)))
    return RunDirectory(root / "outputs" / "student" / "dskd_cma" / "cut")


def test_a_state_goes_on_to_the_losses_of_the_run_left_alone(directory, ranks):
    train(read_run(directory.path), ranks)
    lines, expected = (f.read_text().splitlines() for f in (directory.metrics, GOLDEN / "whole.jsonl"))
    assert len(lines) == len(expected) == 15
    for a, b in zip(map(json.loads, lines), map(json.loads, expected), strict=True):
        assert a["step"] == b["step"]
        key = "loss" if "loss" in b else "dev_loss"
        assert a[key] == pytest.approx(b[key], abs=1e-4)
    assert read_train_state(directory).finished


def test_a_saved_model_loads(directory):
    (folder, name), *_ = directory.models()
    assert (name.epoch, name.step, name.loss) == (1, 4, 6.3239)
    model = load_checkpoint(folder, "fp32", torch.device("cpu"))
    assert model(input_ids=torch.arange(8)[None]).logits.isfinite().all()


def test_what_launchers_read_is_read(directory):
    assert newest_state(directory).step == 6
    assert [step["step"] for step in read_steps(directory)] == [1, 2, 3, 4, 5, 6]
    jobs = Jobs(directory)
    assert (jobs.read().id, jobs.read().nodes, jobs.read().tasks_per_node) == ("7", 1, 2)
    assert [(s.number, s.outcome, s.reason, s.nodes) for s in jobs.starts()] == [
        (1, "again", "preempted", "node1"),
        (2, "running", "", "node2"),
    ]
