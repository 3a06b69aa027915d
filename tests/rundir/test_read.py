"""A run as data, from its directory alone."""

import json
from pathlib import Path

import pytest

from dskd.config.changes import changed
from dskd.config.errors import UserError
from dskd.config.load import load_run, to_yaml
from dskd.launch.status import statuses
from dskd.launch.verbs import format_status
from dskd.rundir.jobs import Job, Jobs
from dskd.rundir.layout import RunDirectory
from dskd.rundir.read import model_of, read_run, read_steps


@pytest.fixture
def run(make_run, tmp_path):
    return load_run(make_run(tmp_path))


def test_a_directory_tells_its_run_wherever_it_was_moved(run, tmp_path):
    moved = tmp_path / "moved" / Path(*run.directory.parts[-3:])
    moved.mkdir(parents=True)
    (moved / "run.yaml").write_text(to_yaml(run))
    assert read_run(moved).directory == moved
    assert changed(run, read_run(moved)) == {}


def test_a_moved_directory_keeps_the_end_of_its_path(run, tmp_path):
    (tmp_path / "run.yaml").write_text(to_yaml(run))
    with pytest.raises(UserError, match=r"must still end in .*/dskd_cma/default"):
        read_run(tmp_path)


FILES = ("job/job.json", "resume/LATEST", "resume/step5/state.json", "args.json", "results.json")


def submitted(folder):
    """A run directory as a submitted, finished run leaves it."""
    jobs = Jobs.at(folder)
    jobs.write(Job("local", ("true",), 1, 1, 60, 30, 5, id="1"))
    jobs.add_start("1", "node1")
    jobs.end_start(1, "finished", "")
    return jobs


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"cluster": 1}', "[" * 100_000, "\x00\xff", '"x"'])
@pytest.mark.parametrize(
    "file", ["job/job.json", "resume/LATEST", "resume/step5/state.json", "args.json", "results.json"]
)
def test_a_damaged_file_of_one_run_is_told_in_its_status_alone(file, content, tmp_path):
    broken, whole = submitted(tmp_path / "broken"), submitted(tmp_path / "whole")
    (tmp_path / "broken" / "resume" / "step5").mkdir(parents=True)
    (tmp_path / "broken" / "resume" / "LATEST").write_text("step5\n")
    (tmp_path / "broken" / file).write_text(content)
    one, other = statuses([broken.directory.path, whole.directory.path])
    assert other.state == "finished"
    assert one.state == "damaged" or (one.state == "finished" and file != "job/job.json")
    assert len(format_status(one).splitlines()) <= 4


def test_a_run_directory_stands_for_its_best_model(tmp_path):
    directory = RunDirectory(tmp_path / "run")
    model = directory.path / "epoch1_step5_loss2.5000"
    model.mkdir(parents=True)
    assert model_of(model) == model
    assert model_of(directory.path) == directory.path  # no run.yaml: a model's folder, or what else it may be
    directory.settings.touch()
    with pytest.raises(UserError, match=f"^{directory.path}: the run has saved no model yet$"):
        model_of(directory.path)
    directory.best.symlink_to(model.name)
    assert model_of(directory.path) == model
    directory.best.unlink()
    directory.best.mkdir()  # a copy that followed the link
    assert model_of(directory.path) == directory.best


def test_lines_that_are_no_figures_of_steps_are_passed_over(tmp_path):
    directory = RunDirectory(tmp_path)
    step = {"step": 1, "seconds": 0.5, "tokens_per_second": 9.0}
    directory.metrics.write_text(
        '{"step": 1, "lo\n' + json.dumps(step) + '\n[]\n{"tokens_per_second": "x"}\n{"step": 2'
    )
    assert read_steps(directory) == [step]
