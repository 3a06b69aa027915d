"""Which saved models are the best, and a state's own words about where a run stands."""

import json

import pytest

from dskd.config.errors import UserError
from dskd.rundir.train_state import SavedModel, Scores, TrainState, best_of, read_state


def model(name, loss, rougel=None):
    return SavedModel(name, Scores(loss, 0.5, rougel))


MODELS = [model("a", 2.0, 30.0), model("b", 1.0, 10.0), model("c", 3.0, 20.0), model("d", 1.0, 20.0)]


@pytest.mark.parametrize(
    ("best_by", "count", "expected"),
    [("loss", 4, "dbac"), ("loss", 2, "db"), ("rougel", 4, "adcb"), ("rougel", 1, "a")],
)
def test_the_best_come_first_and_of_equal_ones_the_newer(best_by, count, expected):
    assert "".join(saved.folder for saved in best_of(MODELS, best_by, count)) == expected


def test_a_state_reads_as_it_was_written(tmp_path):
    now = TrainState(7, True, (MODELS[0], model("e", 0.5)), 123, False)
    (tmp_path / "state.json").write_text(json.dumps({"format": 1, "world_size": 3} | now.to_json()))
    found = read_state(tmp_path)
    assert (found.state, found.world_size) == (now, 3)
    assert str(now.name) == "step7-before-evaluation"


def test_a_state_of_another_format_is_refused(tmp_path):
    assert read_state(tmp_path) is None
    (tmp_path / "state.json").write_text(json.dumps({"format": 2, "world_size": 1} | TrainState(7).to_json()))
    with pytest.raises(UserError, match="state format 2 is not known to this version of dskd"):
        read_state(tmp_path)
