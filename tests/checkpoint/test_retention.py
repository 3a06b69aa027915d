"""What stays in a run directory: never is a model deleted that a whole state names, or one that is on its way."""

import json
import os

import pytest

from dskd.checkpoint import manager as manager_module
from dskd.checkpoint import staging
from dskd.checkpoint.retention import kept_states, model_problem, retain
from dskd.config.errors import UserError
from dskd.config.load import load_run
from dskd.engine.preemption import Stopped
from dskd.rundir.files import published, sha256
from dskd.rundir.layout import STATE, ModelName, RunDirectory, StateName
from dskd.rundir.read import read_train_state
from dskd.rundir.train_state import SavedModel, Scores, TrainState
from dskd.train import train


@pytest.fixture
def run_of(make_run, tmp_path):
    """`run_of(overrides...)`: ten steps of sft, five an epoch; a model after each epoch."""
    file = make_run(tmp_path, method={"kind": "sft"}, train={"epochs": 2, "global_batch_size": 8})

    def load(*overrides):
        return load_run(file, overrides)

    return load


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.fixture(autouse=True)
def no_stop(ranks):
    yield
    ranks.flags.stop_requested = False


def test_by_way_of_a_scratch_folder_an_undisturbed_run_keeps_its_model(run_of, ranks, tmp_path):
    """A state one step before the evaluation is published after the evaluation has saved its model."""
    directory = RunDirectory(
        train(run_of(f"checkpoint.scratch_dir={tmp_path}/scratch", "checkpoint.every_steps=4"), ranks)
    )
    ((folder, name),) = directory.models()
    assert name.step in (5, 10)
    assert directory.best.resolve() == folder
    assert model_problem(folder) is None


def test_a_kill_between_the_last_state_and_the_choice_of_the_best_is_made_up_for(run_of, ranks, monkeypatch):
    whole = RunDirectory(train(run_of("output.name=whole"), ranks))
    retained = manager_module.retention.retain

    def killed_at_the_end(directory, newest, *rest):
        if newest.finished:
            raise KeyboardInterrupt
        retained(directory, newest, *rest)

    monkeypatch.setattr(manager_module.retention, "retain", killed_at_the_end)
    with pytest.raises(KeyboardInterrupt):
        train(run_of("output.name=cut"), ranks)
    monkeypatch.undo()
    cut = RunDirectory(train(run_of("output.name=cut"), ranks))
    assert cut.best.resolve().name == whole.best.resolve().name
    assert [folder.name for folder, _ in cut.models()] == [folder.name for folder, _ in whole.models()]


def test_falling_back_to_an_older_state_deletes_no_sound_model(run_of, ranks):
    run = run_of("checkpoint.keep_last=2", "checkpoint.every_steps=3")
    directory = RunDirectory(train(run, ranks))
    before = {folder.name for folder, _ in directory.models()}
    newest, older = directory.state_names()
    flip(directory.state(newest) / "rank0.safetensors")
    ranks.flags.stop_requested = True  # at once
    with pytest.raises(Stopped):
        train(run, ranks)
    assert directory.best.exists()
    assert model_problem(directory.best.resolve()) is None
    assert before <= {folder.name for folder, _ in directory.models()}
    assert directory.state_names()[0] == older
    assert (directory.states / f"damaged-{newest}.1" / STATE).is_file()


def test_a_new_state_is_kept_where_a_damaged_one_has_a_higher_step(run_of, ranks):
    run = run_of("checkpoint.keep_last=2", "checkpoint.every_steps=3")
    directory = RunDirectory(train(run, ranks))
    flip(directory.state(directory.state_names()[0]) / "rank0.safetensors")
    run = run_of("checkpoint.keep_last=1", "checkpoint.every_steps=3")
    train(run, ranks)
    assert read_train_state(directory).finished
    assert [str(name) for name in directory.state_names()] == ["step10"]


def test_a_damaged_best_model_of_a_finished_run_is_made_again(run_of, ranks):
    run = run_of()
    directory = RunDirectory(train(run, ranks))
    weights = directory.best / "model.safetensors"
    expected, name = sha256(weights), directory.best.resolve().name
    flip(weights)
    train(run, ranks)
    assert sha256(directory.best / "model.safetensors") == expected
    assert (directory.path / f"damaged-{name}.1").is_dir()


@pytest.mark.parametrize("content", [None, "", "step5", "step99\n", "\x00\xff"])
def test_a_damaged_latest_is_mended_though_the_run_is_finished(content, run_of, ranks):
    run = run_of()
    directory = RunDirectory(train(run, ranks))
    directory.latest.unlink()
    if content is not None:
        directory.latest.write_text(content)
    train(run, ranks)
    assert directory.latest.read_text() == "step10\n"


def test_saved_models_have_the_permissions_of_every_other_file(run_of, ranks):
    directory = RunDirectory(train(run_of(), ranks))
    usual = directory.settings.stat().st_mode
    assert {file.stat().st_mode for file in directory.best.iterdir()} == {usual}
    assert {file.stat().st_mode for file in (directory.states / "step10").iterdir()} == {usual}


@pytest.mark.parametrize(
    ("names", "keep_last", "kept"),
    [
        ("step10 step9 step5", 1, "step10"),
        ("step10 step10-before-evaluation step5", 2, "step10 step5"),
        ("step10-before-evaluation step5 step5-before-evaluation", 2, "step10-before-evaluation step5"),
    ],
)
def test_states_before_an_evaluation_take_no_place_of_others(names, keep_last, kept):
    parsed = sorted((StateName.parse(name) for name in names.split()), reverse=True)
    assert [str(name) for name in kept_states(parsed, keep_last)] == kept.split()


def saved(directory, epoch, step, loss):
    name = ModelName(epoch, step, loss)
    with published(directory.model(name)) as folder:
        (folder / "model.safetensors").write_text("x")
    return SavedModel(str(name), Scores(loss, 0.5))


def state(directory, step, *best, pending=False):
    now = TrainState(step, pending, best)
    folder = directory.state(now.name)
    folder.mkdir(parents=True)
    (folder / STATE).write_text(json.dumps({"format": 1, "world_size": 1} | now.to_json()))
    return now


def test_models_that_kept_states_or_coming_ones_name_stay_and_others_go(tmp_path):
    directory = RunDirectory(tmp_path)
    worst, older, newer, coming, later = (saved(directory, i, 5 * i, 3.0 - i / 10) for i in range(1, 6))
    state(directory, 9, older)
    now = state(directory, 16, newer)
    retain(directory, now, 2, [coming])
    assert {folder.name for folder, _ in directory.models()} == {m.folder for m in (older, newer, coming, later)}
    assert directory.best.readlink().name == newer.folder
    retain(directory, now, 1)
    assert {folder.name for folder, _ in directory.models()} == {m.folder for m in (newer, coming, later)}
    assert worst.folder not in {path.name for path in tmp_path.iterdir()}


def test_best_never_names_what_is_not_there(tmp_path):
    directory = RunDirectory(tmp_path)
    there = saved(directory, 1, 5, 2.0)
    retain(directory, state(directory, 6, SavedModel("epoch9_step5_loss1.0000", Scores(1.0, 0.5)), there), 1)
    assert directory.best.resolve().name == there.folder


@pytest.mark.skipif(os.getuid() != 0, reason="giving a folder to another user needs root")
@pytest.mark.parametrize("prepared", ["a link", "a file", "another user's"])
def test_a_scratch_folder_that_someone_else_prepared_is_not_touched(prepared, tmp_path):
    scratch, theirs = tmp_path / "scratch", tmp_path / "theirs"
    scratch.mkdir()
    (theirs / "rank0").mkdir(parents=True)
    (theirs / "rank0" / "precious").write_text("x")
    made = staging.own_folder(scratch, tmp_path / "run", 0).parent
    assert made.stat().st_mode & 0o777 == 0o700
    (made / "rank0").rmdir()
    made.rmdir()
    if prepared == "a link":
        made.symlink_to(theirs)
    elif prepared == "a file":
        made.write_text("")
    else:
        made.mkdir()
        os.chown(made, 12345, 12345)
    with pytest.raises(UserError, match=r"^checkpoint\.scratch_dir: .* is a link, or another user's"):
        staging.own_folder(scratch, tmp_path / "run", 0)
    assert (theirs / "rank0" / "precious").read_text() == "x"
