"""Which settings may change between two starts of a run."""

from dataclasses import replace
from pathlib import Path

import pytest

from dskd.config.changes import changed, harmful, is_longer
from dskd.config.load import load_run, override


@pytest.fixture
def run(make_run, tmp_path):
    return load_run(make_run(tmp_path))


@pytest.mark.parametrize(
    "setting", ["eval.generate=true", "checkpoint.keep_last=3", "train.micro_batch_size=4", "engine.zero_stage=3"]
)
def test_harmless(run, setting):
    changes = changed(run, override(run, [setting]))
    assert list(changes) == [setting.partition("=")[0]]
    assert harmful(changes) == {}


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("train.seed=3", {"train.seed": "10 -> 3"}),
        ("method.kd_rate=0.1", {"method.kd_rate": "0.5 -> 0.1"}),
        ("engine.precision=bf16", {"engine.precision": "fp32 -> bf16"}),
        ("student.lora.rank=4", {"student.lora": "None -> None", "student.lora.rank": "None -> 4"}),
    ],
)
def test_harmful(run, setting, told):
    found = harmful(changed(run, override(run, [setting])))
    assert {key: found.get(key, "None -> None") for key in told} == told


@pytest.mark.parametrize(
    ("before", "after", "longer"),
    [
        ("epochs=1", "epochs=2", True),
        ("epochs=2", "epochs=1", False),
        ("max_steps=5", "max_steps=6", True),
        ("max_steps=5", "max_steps=4", False),
        ("max_steps=5", "max_steps=null", True),
        ("max_steps=null", "max_steps=500", False),
        ("epochs=2", "epochs=2", True),
    ],
)
def test_a_run_may_become_longer(run, before, after, longer):
    then, now = (override(run, [f"train.{setting}"]).train for setting in (before, after))
    assert is_longer(then, now) is longer


def test_where_the_output_lies_does_not_count(run):
    assert changed(run, replace(run, output=replace(run.output, root=Path("/elsewhere")))) == {}
