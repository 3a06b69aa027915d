"""A small run for the tests of faults."""

from pathlib import Path

import pytest
from support.starts import end_all


@pytest.fixture(autouse=True)
def nothing_left():
    """No process outlives the test that started it."""
    yield
    end_all()


@pytest.fixture(scope="session")
def small_run(make_run, tmp_path_factory) -> Path:
    """A run file: 20 steps of sft, 5 an epoch, a state every 2 steps, two of them kept."""
    return make_run(
        tmp_path_factory.mktemp("small"),
        method={"kind": "sft"},
        train={"epochs": 4, "global_batch_size": 8},
        engine={"persistence_threshold": 0},
        checkpoint={"every_steps": 2, "keep_last": 2},
    )
