"""A finished run is taken further by more epochs or steps, without --force."""

import json

import pytest

from dskd.checkpoint.directory import write_settings
from dskd.config.errors import UserError
from dskd.config.load import load_run, override
from dskd.rundir.layout import RunDirectory
from dskd.rundir.read import RunLength, is_complete, read_run, read_train_state
from dskd.train import learning_rates, train


@pytest.fixture
def finished(make_run, tmp_path, ranks):
    """A run of one epoch of five steps."""
    run = load_run(make_run(tmp_path, method={"kind": "sft"}, teacher=None))
    train(run, ranks)
    assert is_complete(RunDirectory.of(run))
    return run


def test_more_epochs_go_on_where_it_ended(finished, ranks):
    longer, directory = override(finished, ["train.epochs=2"]), RunDirectory.of(finished)
    train(longer, ranks)
    steps = [line for line in map(json.loads, directory.metrics.read_text().splitlines()) if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 11))
    for line in steps:
        rates = learning_rates(longer.train, line["step"], 5 if line["step"] <= 5 else 10)
        assert {name: line[name] for name in rates} == rates
    assert "10 steps instead of 5; the learning rates follow the new length" in directory.log.read_text()
    assert read_train_state(directory).finished


def test_a_start_that_ended_before_its_first_new_state_is_not_taken_for_finished(finished, ranks):
    directory = RunDirectory.of(finished)
    write_settings(override(finished, ["train.epochs=2"]), RunLength(10, 5))
    assert not is_complete(directory)
    train(read_run(directory.path), ranks)
    assert read_train_state(directory).step == 10
    assert is_complete(directory)


def test_fewer_steps_are_refused(finished, ranks):
    with pytest.raises(UserError, match=r"other settings \(train.max_steps: None -> 3\)"):
        train(override(finished, ["train.max_steps=3"]), ranks)
