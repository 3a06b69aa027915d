"""Files of a run directory that hold nonsense: told in one line, or taken for none."""

import json

import pytest

from dskd.config.errors import UserError
from dskd.rundir import lock
from dskd.rundir.jobs import Ending, Jobs
from dskd.rundir.layout import ModelName, RunDirectory, StateName
from dskd.rundir.read import newest_state
from dskd.rundir.train_state import FORMAT, TrainState, read_state


@pytest.mark.parametrize(
    "text", [f"step{'9' * 5_000}", "step", "step-1", "step٣", "step9\n\nstep8", "../step9", "step9/.."]
)
def test_a_name_of_no_state(tmp_path, text):
    assert StateName.parse(text) is None
    directory = RunDirectory(tmp_path)
    directory.latest.parent.mkdir()
    directory.latest.write_text(text)
    with pytest.raises(UserError, match=r"LATEST: is damaged: .* names no state$") as raised:
        newest_state(directory)
    assert str(raised.value).isprintable()


@pytest.mark.parametrize("loss", ["1.2.3", ".", "-", "1.", "٣", "9" * 10 + "e9", "inf.", ""])
def test_a_name_of_no_model(loss):
    assert ModelName.parse(f"epoch1_step9_loss{loss}") is None
    assert ModelName.parse(f"epoch1_step9_loss2.5_rougel{loss}") is None
    assert ModelName.parse(f"epoch{'9' * 5_000}_step9_loss2.5") is None


@pytest.mark.parametrize("loss", [2.5, 0.0, -0.25, 1e20, float("nan"), float("inf"), float("-inf")])
def test_a_name_of_a_model_survives(loss):
    name = ModelName(3, 900, loss, 24.1031)
    assert str(ModelName.parse(str(name))) == str(name)


@pytest.mark.parametrize("ranks", [float("inf"), float("nan"), 0, -1, 1.5, "2", None, [2], 2**30, 10**4000])
def test_a_state_of_no_number_of_ranks(tmp_path, ranks):
    (tmp_path / "state.json").write_text(json.dumps({"format": FORMAT, "world_size": ranks} | TrainState(9).to_json()))
    with pytest.raises(UserError, match=r"does not say where the run stands$"):
        read_state(tmp_path)


def test_a_state_of_a_monstrous_format(tmp_path):
    (tmp_path / "state.json").write_text(json.dumps({"format": ["x\n" * 10_000], "world_size": 1}))
    with pytest.raises(UserError, match=r"state format .* is not known to this version of dskd$") as raised:
        read_state(tmp_path)
    assert str(raised.value).isprintable()


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"again": 1}', '{"reason": 3, "again": [], "x": 1e999}', "[" * 100_000]
)
def test_how_a_rank_ended_is_not_known_where_that_is_damaged(tmp_path, text):
    jobs = Jobs.at(tmp_path)
    jobs.make_folder()
    jobs.folder.ending.write_text(text)
    assert jobs.ending() is None or isinstance(jobs.ending(), Ending)
    jobs.clear_ending()
    jobs.mark_ending(Ending(True, "why"))
    assert jobs.ending() == Ending(True, "why")


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "{}", "[" * 100_000, "9" * 10_000, "\0"])
def test_a_holder_that_is_damaged_is_not_known(tmp_path, text):
    (tmp_path / "holder").write_text(text)
    assert lock.read(tmp_path / "holder") is None
