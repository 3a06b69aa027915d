"""Slurm's commands as small programs, and a run to submit to them."""

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
