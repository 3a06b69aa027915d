"""Checks of a whole run: the paths it names, its folder, and how its global batch divides."""

import errno
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dskd.config.data import DataConfig
from dskd.config.errors import UserError
from dskd.config.methods import KdConfig, SftConfig
from dskd.config.models import StudentConfig, TeacherConfig
from dskd.config.run import (
    OutputConfig,
    RunConfig,
    accumulation_steps,
    check_checkpoint,
    check_folders,
    check_paths,
)
from dskd.config.training import CheckpointConfig, TrainConfig


def run_config(global_batch_size: int, micro_batch_size: int) -> RunConfig:
    train = TrainConfig(global_batch_size=global_batch_size, micro_batch_size=micro_batch_size)
    return RunConfig(StudentConfig(Path("/m/student")), DataConfig(Path("/d"), Path("/d")), SftConfig(), train=train)


@pytest.mark.parametrize(
    ("global_", "micro", "ranks", "steps"), [(32, 4, 1, 8), (32, 4, 8, 1), (12, 2, 3, 2), (1, 1, 1, 1)]
)
def test_accumulation_follows_from_the_global_batch(global_, micro, ranks, steps):
    assert accumulation_steps(run_config(global_, micro), ranks) == steps


@pytest.mark.parametrize(("global_", "micro", "ranks", "multiple"), [(32, 4, 3, 12), (32, 5, 1, 5), (2, 4, 1, 4)])
def test_a_global_batch_that_does_not_divide_is_refused(global_, micro, ranks, multiple):
    with pytest.raises(UserError) as raised:
        accumulation_steps(run_config(global_, micro), ranks)
    assert str(raised.value).startswith(f"train.global_batch_size: {global_} does not divide into {ranks} rank(s)")
    assert str(raised.value).endswith(f"a multiple of {multiple} is allowed")


@given(st.integers(1, 64), st.integers(1, 8), st.integers(1, 8))
def test_accumulation_times_ranks_times_micro_batch_is_the_global_batch(global_, micro, ranks):
    try:
        assert accumulation_steps(run_config(global_, micro), ranks) * ranks * micro == global_
    except UserError:
        assert global_ % (ranks * micro)


def test_the_run_directory():
    run = replace(run_config(4, 4), output=OutputConfig(Path("/o"), "first"))
    assert run.directory == Path("/o/student/sft/first")


@pytest.fixture
def run(tmp_path) -> RunConfig:
    """A run whose files and folders exist, empty as they are."""
    for model in ("student", "teacher"):
        (tmp_path / model).mkdir()
        (tmp_path / model / "config.json").write_text("{}")
        (tmp_path / model / "model.safetensors").touch()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "train.jsonl").touch()
    (tmp_path / "dev.jsonl").touch()
    return RunConfig(
        StudentConfig(tmp_path / "student"),
        DataConfig(tmp_path / "train.jsonl", tmp_path / "dev.jsonl"),
        KdConfig(),
        TeacherConfig(tmp_path / "teacher", tmp_path / "adapter"),
    )


MISSING = [
    ("train.jsonl", "data.train: no such file: {path}"),
    ("dev.jsonl", "data.dev: no such file: {path}"),
    ("student", "student.path: no such folder: {path} (a downloaded Hugging Face model is expected)"),
    ("student/config.json", "student.path: no config.json in {path.parent}"),
    ("student/model.safetensors", "student.path: no weights in {path.parent}: a .safetensors file is expected"),
    ("teacher", "teacher.path: no such folder: {path}"),
    ("teacher/config.json", "teacher.path: no config.json in {path.parent}"),
    ("teacher/model.safetensors", "teacher.path: no weights in {path.parent}"),
    ("adapter/adapter_config.json", "teacher.adapter: no LoRA adapter (adapter_config.json) in {path.parent}"),
]


def remove(path: Path) -> None:
    for inner in path.iterdir() if path.is_dir() else ():
        remove(inner)
    path.rmdir() if path.is_dir() else path.unlink()


@pytest.mark.parametrize(("name", "expected"), MISSING)
def test_what_is_missing_is_told_with_its_key(run, tmp_path, name, expected):
    check_paths(run)
    remove(tmp_path / name)
    with pytest.raises(UserError) as raised:
        check_paths(run)
    assert str(raised.value).startswith(expected.format(path=tmp_path / name))
    assert len(str(raised.value).splitlines()) == 1


def test_a_folder_is_no_records_file(run, tmp_path):
    (tmp_path / "dev.jsonl").unlink()
    (tmp_path / "dev.jsonl").mkdir()
    with pytest.raises(UserError, match=r"^data\.dev: no such file"):
        check_paths(run)


def test_pickled_weights_do_not_count(run, tmp_path):
    (tmp_path / "teacher" / "model.safetensors").rename(tmp_path / "teacher" / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pickled \.bin files are not read"):
        check_paths(run)


def test_an_adapter_as_a_model_is_told_where_it_belongs(run, tmp_path):
    with pytest.raises(UserError) as raised:
        check_paths(replace(run, teacher=replace(run.teacher, path=tmp_path / "adapter")))
    told = "is a LoRA adapter; teacher.path takes the whole model that it is for and teacher.adapter this one"
    assert str(raised.value) == f"teacher.path: {tmp_path / 'adapter'} {told}"
    with pytest.raises(UserError, match=r"is a LoRA adapter; student.path takes the whole model that it is for$"):
        check_paths(replace(run, student=replace(run.student, path=tmp_path / "adapter")))


@pytest.mark.parametrize(
    ("config", "fits"),
    [
        ({"max_position_embeddings": 511}, False),
        ({"n_positions": 100}, False),
        ({"text_config": {"max_position_embeddings": 100}}, False),
        ({"max_position_embeddings": 512}, True),
        ({"max_position_embeddings": -1}, True),
        ({"max_position_embeddings": "x", "text_config": 3}, True),
        ({}, True),
    ],
)
@pytest.mark.parametrize("role", ["student", "teacher"])
def test_records_that_are_longer_than_a_model_reaches_are_refused(run, tmp_path, role, config, fits):
    (tmp_path / role / "config.json").write_text(json.dumps(config))
    if fits:
        check_paths(run)
    else:
        with pytest.raises(UserError, match=r"^data.max_length: 512 is more than the \d+ positions of "):
            check_paths(run)


def test_answers_that_are_longer_than_the_student_reaches_are_refused_where_it_answers(run, tmp_path):
    (tmp_path / "student" / "config.json").write_text('{"n_positions": 512}')
    longer = replace(run.eval, generation=replace(run.eval.generation, max_length=513))
    check_paths(replace(run, eval=longer))
    with pytest.raises(UserError, match=r"^eval.generation.max_length: 513 is more than the 512 positions of "):
        check_paths(replace(run, eval=replace(longer, generate=True)))


def test_a_teacher_that_the_method_does_not_need_is_not_looked_at(run, tmp_path):
    remove(tmp_path / "teacher")
    remove(tmp_path / "adapter")
    without = replace(run, method=SftConfig())
    check_paths(without)
    assert without.teacher == run.teacher


@pytest.mark.parametrize(("name", "fits"), [("student", True), ("adapter", True), ("none", False), (".", False)])
def test_a_checkpoint_is_a_whole_model_or_an_adapter(run, tmp_path, name, fits):
    assert run.student.path.parent == tmp_path
    if fits:
        assert check_checkpoint(tmp_path / name) is None
    else:
        with pytest.raises(UserError):
            check_checkpoint(tmp_path / name)


@pytest.mark.parametrize("text", ["[]", "3", "null", "{", "", "[" * 100_000, "9" * 10_000, "\0"])
@pytest.mark.parametrize(
    "name", ["student/config.json", "student/tokenizer_config.json", "adapter/adapter_config.json"]
)
def test_a_configuration_that_is_no_object_is_told_before_torch_is_loaded(run, tmp_path, name, text):
    (tmp_path / name).write_text(text)
    key = {"student": "student.path", "adapter": "teacher.adapter"}[Path(name).parent.name]
    with pytest.raises(UserError) as raised:
        check_paths(run)
    assert str(raised.value) == f"{key}: {tmp_path / name} holds no JSON object"
    with pytest.raises(UserError, match="holds no JSON object"):
        check_checkpoint(tmp_path / Path(name).parent)


WRITTEN = {
    "output.root": lambda run, path: replace(run, output=OutputConfig(path)),
    "data.cache_dir": lambda run, path: replace(run, data=replace(run.data, cache_dir=path)),
    "checkpoint.scratch_dir": lambda run, path: replace(run, checkpoint=CheckpointConfig(scratch_dir=path)),
}


@pytest.mark.parametrize(("key", "with_path"), WRITTEN.items(), ids=WRITTEN)
def test_a_folder_that_cannot_be_made_is_told_with_its_key(run, tmp_path, key, with_path):
    check_folders(with_path(run, tmp_path / "not" / "yet"))
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ("train.jsonl", "dangling"):
        for folder in (tmp_path / name, tmp_path / name / "below"):
            with pytest.raises(UserError) as raised:
                check_folders(with_path(run, folder))
            assert str(raised.value) == f"{key}: cannot write {folder}: {tmp_path / name} is no folder"


def test_a_folder_that_is_not_ours_is_told(run, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(UserError, match=f"^output.root: cannot write {tmp_path}/out: {tmp_path} is not writable$"):
        check_folders(replace(run, output=OutputConfig(tmp_path / "out")))
    check_folders(replace(run, output=OutputConfig(tmp_path / "student")))


@pytest.mark.parametrize("number", [errno.EACCES, errno.ELOOP])
def test_a_file_that_we_may_not_look_at_is_told(run, monkeypatch, number):
    def refuse(path):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(Path, "is_file", refuse)
    with pytest.raises(UserError, match=f"^data.train: {run.data.train} cannot be read: {os.strerror(number)}$"):
        check_paths(run)
