"""The same run on another number of ranks after each stop."""

import signal

import pytest
from support.compare import lines, steps
from support.starts import Start, finish

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def whole(small_run, tmp_path_factory):
    root = tmp_path_factory.mktemp("whole")
    finish(root / "log", "train", small_run, f"output.root={root}", "output.name=whole", ranks=2)
    return next(root.glob("*/*/whole"))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_then_one_then_two(stage, small_run, whole, tmp_path):
    command = ["train", small_run, f"output.root={tmp_path}", f"engine.zero_stage={stage}"]
    directory = tmp_path / whole.relative_to(whole.parents[2]).parent / "default"
    for ranks, until in ((2, 4), (1, 11)):
        start = Start(tmp_path / "log", *command, ranks=ranks)
        start.until(lambda until=until: steps(directory) >= until)
        start.send(signal.SIGTERM)
        assert start.wait() == [75] * ranks, start.text()
    told = finish(tmp_path / "log", *command, ranks=2)
    assert "1 rank(s) wrote the state, 2 go on" in told
    expected, found = ([line for line in lines(d) if "loss" in line] for d in (whole, directory))
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in expected], abs=1e-4)


def test_the_stage_may_change_as_well(small_run, whole, tmp_path):
    command = ["train", small_run, f"output.root={tmp_path}"]
    directory = tmp_path / whole.relative_to(whole.parents[2]).parent / "default"
    start = Start(tmp_path / "log", *command, "engine.zero_stage=3", ranks=2)
    start.until(lambda: steps(directory) >= 6)
    start.send(signal.SIGTERM)
    assert start.wait() == [75, 75]
    assert "changed: engine.zero_stage: 3 -> 1" in finish(tmp_path / "log", *command, "engine.zero_stage=1")
    expected, found = ([line["loss"] for line in lines(d) if "loss" in line] for d in (whole, directory))
    assert found == pytest.approx(expected, abs=1e-4)
