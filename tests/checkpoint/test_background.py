"""Saving while training goes on: the same files as if it had waited, and never one that is not whole."""

import errno
import os
import re
import time
from dataclasses import replace

import pytest
from support.compare import figures

from dskd.checkpoint import host_memory, models, staging
from dskd.checkpoint import manager as manager_module
from dskd.checkpoint.retention import model_problem
from dskd.config.errors import UserError
from dskd.config.load import load_run
from dskd.engine.preemption import Stopped
from dskd.rundir.files import sha256, write_files
from dskd.rundir.layout import RunDirectory
from dskd.rundir.read import read_train_state
from dskd.rundir.train_state import read_state
from dskd.train import train


@pytest.fixture(scope="module")
def run_of(make_run, tmp_path_factory):
    """`run_of(name, overrides...)`: ten steps of dskd, five an epoch; a state after each, all of them kept."""
    file = make_run(
        tmp_path_factory.mktemp("run"),
        method={"kind": "dskd"},
        train={"epochs": 2, "global_batch_size": 8},
        checkpoint={"every_steps": 1, "keep_last": 10, "keep_best": 2},
    )

    def load(name, *overrides):
        return load_run(file, [f"output.name={name}", *overrides])

    return load


@pytest.fixture(scope="module")
def waited(run_of, ranks):
    """The run whose training waits for all that is saved."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host_memory, "free_memory", lambda: 0)
        return RunDirectory(train(run_of("waited"), ranks))


@pytest.fixture
def slowly(monkeypatch):
    """What is written takes longer than a step; the folders that were written to."""
    folders = []

    def write(folder, files):
        folders.append(folder)
        time.sleep(0.3)
        return write_files(folder, files)

    monkeypatch.setattr(staging, "write_files", write)
    return folders


@pytest.fixture(autouse=True)
def no_stop(ranks):
    yield
    ranks.flags.stop_requested = False


def files_of(directory):
    """Sums of states and models, and where the run stood, with the number of lines that metrics.jsonl had."""
    found, metrics = {}, directory.metrics.read_bytes()
    for name in directory.state_names():
        stood = read_state(directory.state(name)).state
        found[name] = replace(stood, metrics_bytes=metrics[: stood.metrics_bytes].count(b"\n"))
    folders = [*map(directory.state, directory.state_names()), *(folder for folder, _ in directory.models())]
    for file in (file for folder in folders for file in folder.iterdir()):
        if file.name not in ("state.json", "MANIFEST.json"):
            found[file.relative_to(directory.path)] = sha256(file)
    return found


@pytest.mark.parametrize("way", ["scratch_dir", "memory"])
def test_what_is_written_later_is_what_was_then(way, run_of, ranks, waited, slowly, tmp_path):
    scratch = [f"checkpoint.scratch_dir={tmp_path}"] if way == "scratch_dir" else []
    directory = RunDirectory(train(run_of(way, *scratch), ranks))
    expected, found = files_of(waited), files_of(directory)
    assert len(waited.state_names()) == 10
    assert 2 <= len(directory.state_names()) < 10  # while one was written, the next ones had to wait
    assert {name: expected[name] for name in found} == found
    assert len(list(directory.models())) == 2
    assert all(model_problem(folder) is None for folder, _ in directory.models())
    assert figures(directory.path) == figures(waited.path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_transformers_and_peft_write_no_tensors_themselves(tmp_path):
    """Else they would hold the interpreter meanwhile, and their files would be read again for their sums."""
    with models.tensors_kept(tmp_path) as kept:
        models.modeling_utils.safe_save_file({}, f"{tmp_path}/model.safetensors", {"format": "pt"})
        models.peft_model.safe_save_file({}, tmp_path / "other" / "adapter_model.safetensors")
    assert sorted(kept) == ["model.safetensors", "other/adapter_model.safetensors"]
    assert kept["model.safetensors"].metadata == {"format": "pt"}
    assert models.modeling_utils.safe_save_file.__module__ == "safetensors.torch"


def test_a_stop_waits_until_all_is_written(run_of, ranks, slowly, monkeypatch):
    manager = manager_module.CheckpointManager
    saved = manager.save

    def stop_after(self, now):
        saved(self, now)
        ranks.flags.stop_requested = True

    monkeypatch.setattr(manager, "save", stop_after)
    run = run_of("stopped")
    with pytest.raises(Stopped) as stopped:
        train(run, ranks)
    directory = RunDirectory.of(run)
    assert read_train_state(directory).step == stopped.value.saved == 2  # the state after step 1 was on its way
    assert list(directory.unfinished()) == []


@pytest.mark.parametrize("what", [".step[2-9].*", ".epoch1_step5_.*"])
def test_what_a_thread_cannot_write_ends_the_run_in_one_line(what, run_of, ranks, waited, monkeypatch):
    def write(folder, files):
        if re.match(rf"\{what}", folder.name):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(folder))
        return write_files(folder, files)

    monkeypatch.setattr(staging, "write_files", write)
    run = run_of(f"failing-{what[1:5]}")
    with pytest.raises(UserError, match=r"^output\.root: cannot write .*: Read-only file system$"):
        train(run, ranks)
    directory = RunDirectory.of(run)
    assert max(name.step for name in directory.state_names()) < 5
    assert list(directory.models()) == []
    monkeypatch.undo()
    train(run, ranks)
    newest = waited.state(waited.state_names()[0]) / "rank0.safetensors"
    assert sha256(directory.state(directory.state_names()[0]) / "rank0.safetensors") == sha256(newest)


def test_what_a_thread_cannot_publish_ends_the_run_too(run_of, ranks, monkeypatch):
    def refused(temporary, folder, files):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(folder))

    monkeypatch.setattr(manager_module.state, "publish", refused)
    run = run_of("unpublished")
    with pytest.raises(UserError, match=r"^output\.root: cannot write .*step1: Read-only file system$"):
        train(run, ranks)
    assert RunDirectory.of(run).state_names() == []
