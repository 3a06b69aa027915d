"""A run goes on with the records and models that it began with, or says what differs."""

import json
import shutil

import pytest

from dskd.config.errors import UserError
from dskd.config.load import load_run, override
from dskd.rundir.layout import RunDirectory
from dskd.rundir.read import read_run
from dskd.train import train


@pytest.fixture
def begun(make_run, tmp_path, ranks):
    """A run of one step on a model of its own."""
    run = load_run(make_run(tmp_path, method={"kind": "sft"}, teacher=None, train={"max_steps": 1}))
    shutil.copytree(run.student.path, tmp_path / "student")
    run = override(run, [f"student.path={tmp_path / 'student'}"])
    train(run, ranks)
    return run


def test_changed_records_and_tokenizers_are_refused_and_taken_by_force(begun, tmp_path, ranks):
    lines = (tmp_path / "train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "train.jsonl").write_text("".join(lines[:20]))
    tokenizer = tmp_path / "student" / "tokenizer.json"
    tokenizer.write_text(json.dumps(json.loads(tokenizer.read_text()), indent=1))
    with pytest.raises(UserError) as raised:
        train(read_run(begun.directory), ranks)
    told = str(raised.value)
    assert f"data.train: another content since the last start in {tmp_path}/train.jsonl: records" in told
    assert f"student.path: another content since the last start in {tmp_path}/student: tokenizer.json" in told
    assert "--force" in told
    train(read_run(begun.directory), ranks, force=True)
    assert "changed: data.train: another content" in RunDirectory.of(begun).log.read_text()
    train(read_run(begun.directory), ranks)


def test_records_and_models_may_lie_elsewhere(begun, tmp_path, ranks):
    shutil.copy(tmp_path / "train.jsonl", tmp_path / "same.jsonl")
    before = RunDirectory.of(begun).args.read_bytes()
    train(override(begun, [f"data.train={tmp_path / 'same.jsonl'}"]), ranks)
    assert RunDirectory.of(begun).args.read_bytes() == before


def test_a_run_without_sums_goes_on(begun, tmp_path, ranks):
    args = RunDirectory.of(begun).args
    kept = json.loads(args.read_text())
    del kept["content"]
    args.write_text(json.dumps(kept))
    (tmp_path / "dev.jsonl").write_text((tmp_path / "train.jsonl").read_text())
    assert train(begun, ranks) == begun.directory
