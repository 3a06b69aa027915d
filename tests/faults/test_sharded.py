"""Runs with the teacher in pieces on several ranks: the resident teacher's losses, and the same end after a stop."""

import signal

import pytest
from support.compare import figures, lines, steps
from support.starts import Start, finish

from dskd.rundir.files import sha256

pytestmark = pytest.mark.faults
METHODS = ["kd", "dskd_cma", "uld", "dskd_v2"]


@pytest.fixture(scope="module")
def run_of(make_run, tmp_path_factory):
    """`run_of(kind)`: a run file of 5 steps, its student under ZeRO-3."""

    def make(kind: str):
        return make_run(
            tmp_path_factory.mktemp(kind),
            method={"kind": kind},
            train={"micro_batch_size": 1},
            engine={"zero_stage": 3, "persistence_threshold": 0},
            checkpoint={"every_steps": 2},
        )

    return make


def trained(run_file, root, *settings, ranks):
    finish(root / "log", "train", run_file, f"output.root={root}", *settings, ranks=ranks)
    return next(root.glob("*/*/default"))


@pytest.mark.parametrize("kind", METHODS)
def test_four_ranks_give_the_resident_teacher_s_losses(kind, run_of, tmp_path):
    run_file, losses = run_of(kind), []
    for backend in ("resident", "sharded"):
        root = tmp_path / backend
        root.mkdir()
        directory = trained(run_file, root, f"teacher.backend={backend}", ranks=4)
        losses.append([line["loss"] for line in lines(directory) if "loss" in line])
    assert len(losses[0]) == 5
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_each_of_two_nodes_holds_a_teacher(run_of, tmp_path):
    """Each rank as the first of its node, so that none shares anything."""
    run_file, losses = run_of("dskd_cma"), []
    for settings, places in (((), {}), (("teacher.backend=sharded", "teacher.shard_group=node"), {"LOCAL_RANK": "0"})):
        root = tmp_path / str(len(losses))
        root.mkdir()
        finish(root / "log", "train", run_file, f"output.root={root}", *settings, ranks=2, **places)
        losses.append([line["loss"] for line in lines(next(root.glob("*/*/default"))) if "loss" in line])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_a_run_that_was_stopped_ends_as_if_never(run_of, tmp_path):
    run_file, ends = run_of("dskd_cma"), []
    sharded = ("teacher.backend=sharded", "teacher.offload=cpu")
    for stops in ((), (1, 3)):
        root = tmp_path / str(len(ends))
        root.mkdir()
        command = ["train", run_file, f"output.root={root}", *sharded]
        for stop in stops:
            start = Start(root / "log", *command, ranks=2)
            start.until(lambda stop=stop, root=root: any(steps(d) >= stop for d in root.glob("*/*/default")))
            start.send(signal.SIGTERM)
            assert start.wait() == [75, 75], start.text()
        directory = trained(run_file, root, *sharded, ranks=2)
        models = {file.name: sha256(file) for file in directory.glob("epoch*/*.safetensors")}
        ends.append((figures(directory), models))
    assert ends[0] == ends[1]
    assert len(ends[0][0]) == 6
