"""A teacher in int8: where it is refused, and that it counts as another one. It loads on a GPU alone."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoTokenizer

from dskd.config.changes import changed, harmful
from dskd.config.errors import UserError
from dskd.config.load import load_run
from dskd.data.shard import Shard
from dskd.plan.forecast import Forecast
from dskd.plan.machine import assumed_machine
from dskd.plan.memory import teacher_held
from dskd.plan.models import read_models
from dskd.teachers import resident
from dskd.teachers.cache.folder import CacheFolder, describe, differences
from dskd.teachers.cache.write import write_cache
from dskd.teachers.resident import load_resident

INT8 = "teacher.quantize=int8"


@pytest.fixture
def run_file(make_run, tmp_path):
    return make_run(tmp_path)


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ("teacher.backend=sharded", r"teacher\.quantize: int8 needs backend resident, or cache$"),
        ("teacher.adapter=/adapter", r"teacher\.quantize: int8 takes no adapter: merge it into a model before$"),
        ("teacher.quantize=int4", r"teacher\.quantize: .*none.*int8"),
    ],
)
def test_settings_that_do_not_go_with_it(other, expected, run_file):
    with pytest.raises(UserError, match=expected):
        load_run(run_file, [INT8, other])


@pytest.mark.parametrize(
    ("device", "there", "expected"),
    [
        ("cpu", True, r"^teacher\.quantize: int8 needs a GPU, and none is visible$"),
        ("cuda", False, r"^teacher\.quantize: int8 needs the package bitsandbytes: pip install bitsandbytes$"),
    ],
)
def test_without_a_gpu_or_the_package_it_is_refused_in_one_line(device, there, expected, run_file, monkeypatch):
    monkeypatch.setattr(resident.importlib.util, "find_spec", lambda name: there or None)
    settings = load_run(run_file, [INT8]).teacher
    with pytest.raises(UserError, match=expected):
        load_resident(settings, AutoTokenizer.from_pretrained(settings.path), "fp32", torch.device(device))


def test_several_processes_make_no_cache_of_it(run_file, ranks):
    with pytest.raises(UserError, match=r"^teacher\.quantize: with int8 one process alone makes a cache"):
        write_cache(load_run(run_file, [INT8]), Shard(), replace(ranks, world_size=2))


def test_it_is_another_teacher(run_file):
    """For a run that would go on with it, and for a cache."""
    plain, quantized = load_run(run_file), load_run(run_file, [INT8])
    assert set(harmful(changed(plain, quantized))) == {"teacher.quantize"}
    about = [describe(run, run.teacher, lambda: None) for run in (plain, quantized)]
    assert CacheFolder.of(plain, about[0]) != CacheFolder.of(quantized, about[1])
    assert differences(about[1], about[0]) == ["quantize: None -> int8"]
    assert "quantize" not in about[0]  # as in the caches of before


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_forecast_counts_a_byte_for_each_weight_of_its_layers(precision, run_file):
    held = []
    for setting in ("none", "int8"):
        run = load_run(run_file, [f"teacher.quantize={setting}", f"engine.precision={precision}"])
        models = read_models(run)
        held.append(teacher_held(Forecast(run, models, assumed_machine(run), "resident").step))
    size, shape = {"bf16": 2, "fp32": 4}[precision], models.teacher
    assert held == [shape.weights * size, (shape.weights - shape.body_weights) * size + shape.body_weights]
