"""What real steps take, beside their forecast."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from support.published import QWEN_1_5B, QWEN_72B
from support.starts import finish

from dskd.config.load import load_run
from dskd.plan.forecast import Correction, Forecast
from dskd.plan.measured import Measured, correct
from dskd.plan.memory import highest
from dskd.plan.models import read_models


@pytest.fixture
def forecast(tmp_path) -> Forecast:
    """Of a run on one GPU, whose peak is among its activations."""
    for name, config in (("teacher", QWEN_72B), ("student", QWEN_1_5B)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    paths = f"student: {{path: {tmp_path}/student}}\nteacher: {{path: {tmp_path}/teacher}}\nmethod: {{kind: kd}}\n"
    (tmp_path / "run.yaml").write_text(f"{paths}data: {{train: {tmp_path}/none, dev: {tmp_path}/none}}\n")
    run = load_run(tmp_path / "run.yaml", ["train.micro_batch_size=16"])
    found = Measured(1, 1.0, 400, 32 * 400, 32 * 300, 16 * 300, 1, 80 * 10**9)
    return Forecast(run, read_models(run), found.machine, "cache")


def measured(forecast: Forecast, share: float) -> Measured:
    """What measuring would find if activations were so much of those predicted for records of 400 tokens."""
    found = Measured(1, 1.0, 400, 32 * 400, 32 * 300, 16 * 300, 1, 80 * 10**9)
    same = replace(forecast, models=replace(forecast.models, workload=found.workload), correction=Correction(share))
    return replace(found, peak=highest(same.step).total)


def test_a_correction_gives_what_was_measured(forecast):
    found = measured(forecast, 1.3)
    line, correction = correct(forecast, found)
    assert correction.activations == pytest.approx(1.3, abs=1e-3)
    assert f"measured: {found.peak / 1e9:.2f} GB a rank" in line
    again = replace(forecast, correction=correction, models=replace(forecast.models, workload=found.workload))
    assert highest(again.step).total == pytest.approx(found.peak, rel=1e-6)
    assert again.hours == pytest.approx(correction.hours * replace(again, correction=Correction()).hours)


def test_what_fits_exactly_is_left_alone(forecast):
    assert correct(forecast, measured(forecast, 1.0))[1].activations == 1.0


def test_the_steps_of_a_real_run_are_measured_and_nothing_is_written(make_run, tmp_path):
    run = make_run(tmp_path)
    before = sorted(tmp_path.iterdir())
    shown = finish(tmp_path.parent / "output", "plan", run, "--measure", ranks=2)
    first, *rest = shown.splitlines()
    assert first.startswith("measured: 0.")
    assert " s a step, predicted " in first
    assert any(line.startswith("this machine: ") and "for 2 process(es) on CPUs" in line for line in rest)
    assert any(line.startswith("fits: ") for line in rest)
    assert sorted(tmp_path.iterdir()) == before


def test_the_configuration_alone_is_not_enough_to_measure(forecast, tmp_path):
    Path(tmp_path / "none").write_text('{"prompt": "p", "output": "o"}\n')
    shown = finish(tmp_path / "output", "plan", tmp_path / "run.yaml", "--measure", code=2)
    assert "student.path: no weights in " in shown
