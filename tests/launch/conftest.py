"""Slurm's commands as small programs, a run to submit to them, and pipelines of such runs."""

import json
from pathlib import Path

import pytest
from support.fake_slurm import FakeSlurm


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    fake = FakeSlurm(tmp_path)
    fake.install(monkeypatch)
    yield fake
    fake.end_all()


@pytest.fixture
def run(make_run, tmp_path) -> Path:
    return make_run(tmp_path, method={"kind": "sft"}, teacher=None)


@pytest.fixture(scope="module")
def folder(make_run, tmp_path_factory):
    """With run.yaml, and records in dev.jsonl and train.jsonl."""
    return make_run(tmp_path_factory.mktemp("pipeline"), method={"kind": "sft"}, teacher=None).parent


@pytest.fixture
def write(folder):
    def write_file(stages: dict[str, object]) -> Path:
        file = folder / "pipeline.yaml"
        file.write_text(json.dumps({"stages": stages}, ensure_ascii=False), encoding="utf-8")
        return file

    return write_file
