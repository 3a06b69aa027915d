"""The status of runs that were started on this machine, without any Slurm."""

import json
import multiprocessing
from pathlib import Path

import pytest

from dskd.config.errors import UserError
from dskd.launch.status import known_among, runs_under, statuses
from dskd.launch.verbs import format_status
from dskd.rundir import lock
from dskd.rundir.layout import RunDirectory

MODEL = "epoch1_step5_loss2.5000"
SCORES = {"loss": 2.5, "accuracy": 0.25, "rougel": None, "exact_match": None}


@pytest.fixture
def directory(tmp_path):
    """A run that has made 7 of 10 steps, with its last state at step 5."""
    found = RunDirectory(tmp_path / "outputs" / "student" / "sft" / "default")
    state = found.states / "step5"
    state.mkdir(parents=True)
    found.settings.write_text("")
    found.args.write_text(json.dumps({"length": {"total_steps": 10, "steps_per_epoch": 5}}))
    steps = [{"step": step, "seconds": 60.0, "tokens_per_second": 100.0} for step in range(1, 8)]
    found.metrics.write_text("".join(json.dumps(line) + "\n" for line in steps))
    best = [{"folder": MODEL, "scores": SCORES}]
    write_state(state, {"step": 5, "pending": False, "best": best, "metrics_bytes": 0, "finished": False})
    found.latest.write_text("step5\n")
    return found


def write_state(folder: Path, values: dict) -> None:
    (folder / "state.json").write_text(json.dumps({"format": 1, "world_size": 1} | values))


def shown(directory: RunDirectory) -> list[str]:
    (status,) = statuses([directory.path])
    return format_status(status).splitlines()[1:]


def hold(path, pipe):
    with lock.held(RunDirectory(path), print):
        pipe.send("held")
        pipe.poll(60)


def test_a_run_that_somebody_works_in_is_running(directory):
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=hold, args=(directory.path, theirs))
    process.start()
    assert ours.recv() == "held"
    first, second, third = shown(directory)
    ours.send("end")
    process.join()
    assert first.startswith("  here running on ")
    assert f" process {process.pid} " in first
    assert second == "  step 7/10, 100 tokens/s, about 3.0 min left, last state at step 5"
    assert third == f"  best model {MODEL} (dev loss 2.5000  accuracy 25.0 %)"


def test_a_run_that_nobody_works_in_is_stopped_or_finished(directory):
    assert shown(directory)[:2] == ["  here stopped", "  step 7/10, 100 tokens/s, last state at step 5"]
    best = [{"folder": MODEL, "scores": SCORES}]
    values = {"step": 10, "pending": False, "best": best, "metrics_bytes": 0, "finished": True}
    write_state(directory.states / "step5", values)
    assert shown(directory)[0] == "  here finished"


def test_a_run_before_its_first_state_has_no_best_model(directory):
    directory.latest.unlink()
    assert shown(directory) == ["  here stopped", "  step 7/10, 100 tokens/s, no state yet"]


def test_a_damaged_run_is_told(directory):
    (directory.states / "step5" / "state.json").write_text("[")
    assert shown(directory)[0].startswith("  here damaged (")


def test_all_runs_under_a_folder_are_found(directory):
    job = directory.path.parent / "submitted" / "job"
    job.mkdir(parents=True)
    (job / "job.json").touch()
    (job / "run.yaml").touch()
    directory.job.path.mkdir()
    directory.job.settings.touch()
    assert runs_under(directory.path.parents[2]) == [directory.path, job.parent]


def test_what_is_no_run_is_skipped_where_a_pattern_finds_it(directory, tmp_path):
    cache = tmp_path / "outputs" / "cache" / "teacher-1" / "cache.json"
    cache.parent.mkdir(parents=True)
    cache.write_text("{}")
    assert known_among([cache, directory.path]) == ([directory.path], [cache])
    with pytest.raises(UserError, match=r"cache\.json: no run\.yaml"):
        known_among([cache])
