"""A run that goes on from a state makes the very step that the run which wrote it made: weights, moments, dropout."""

import pytest
import torch
from safetensors.torch import load_file

from dskd.assemble import assemble
from dskd.checkpoint import state
from dskd.checkpoint.shards import pieces_file
from dskd.checkpoint.staging import Staging
from dskd.config.load import load_run
from dskd.rundir.files import write_hashed
from dskd.rundir.layout import RunDirectory
from dskd.rundir.train_state import SavedModel, Scores, TrainState
from dskd.train import train_step

MEASURED = ("seconds", "tokens_per_second")
BEST = (SavedModel("epoch1_step2_loss2.5000", Scores(2.5, 0.25)),)


@pytest.fixture
def run_of(make_run, tiny, tmp_path):
    """`run_of(stage, precision)`: dskd on a student that drops out much."""

    def load(stage, precision):
        file = make_run(
            tmp_path,
            student={"path": tiny("gpt2", "pieces", resid_pdrop=0.3, embd_pdrop=0.3)},
            teacher={"path": tiny("mistral")},
            method={"kind": "dskd"},
            train={"global_batch_size": 8, "clip": 0.1},
            engine={"zero_stage": stage, "precision": precision, "persistence_threshold": 0},
        )
        return load_run(file)

    return load


def make_step(training, step):
    """Make a step; its figures."""
    batches = [training.train(indices) for indices in training.plan.micro_batches(step - 1, 0, 1)]
    figures = train_step(training, step, batches)
    return {name: value for name, value in figures.items() if name not in MEASURED}


def write(training, now):
    """Write and publish a state; its folder."""
    directory, ranks = RunDirectory.of(training.run), training.ranks
    folder, staging = directory.state(now.name), Staging(None, directory.path, ranks.rank)
    state.complete(directory, now, state.write(folder, staging, None, training.engine, ranks).result())
    return folder


def kept(training, file):
    """All weights and moments, by name."""
    write_hashed(file, pieces_file(training.engine, torch.clone, {}, {}))
    return load_file(file)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", range(4))
def test_the_step_after_a_state_is_the_same_step(stage, precision, run_of, ranks, tmp_path):
    run = run_of(stage, precision)
    first = assemble(run, ranks)
    for step in (1, 2):
        make_step(first, step)
    folder = write(first, TrainState(2))
    before, figures = kept(first, tmp_path / "before"), make_step(first, 3)

    second = assemble(run, ranks)
    assert state.load(folder, second.engine, run.train.seed, ranks) == []
    restored = kept(second, tmp_path / "restored")
    assert {name: len(values) for name, values in restored.items()} == {n: len(v) for n, v in before.items()}
    assert all(before[name].equal(values) for name, values in restored.items())
    assert any(name.startswith("exp_avg_sq:") and values.any() for name, values in restored.items())
    assert make_step(second, 3) == figures
    last, expected = kept(second, tmp_path / "last"), kept(first, tmp_path / "expected")
    assert all(expected[name].equal(values) for name, values in last.items())
    assert (tmp_path / "last").read_bytes() == (tmp_path / "expected").read_bytes()  # the counted steps as well


def test_without_the_state_the_step_would_be_another(run_of, ranks):
    """So that the test above cannot pass by doing nothing."""
    found = []
    for steps in (range(1, 4), range(3, 4)):
        training = assemble(run_of(0, "fp32"), ranks)
        found.append([make_step(training, step) for step in steps][-1])
    assert found[0]["loss"] != pytest.approx(found[1]["loss"], rel=1e-4)


def test_a_state_is_found_with_where_the_run_stood(run_of, ranks):
    training = assemble(run_of(0, "fp32"), ranks)
    make_step(training, 1)
    write(training, TrainState(1))
    now = TrainState(2, pending=True, best=BEST, metrics_bytes=17)
    folder = write(training, now)
    found = state.find(RunDirectory.of(training.run), ranks)
    assert (found.folder, found.state, found.damaged, found.notes) == (folder, now, (), ())


def test_a_state_that_was_changed_afterwards_is_passed_over(run_of, ranks):
    training = assemble(run_of(0, "fp32"), ranks)
    make_step(training, 1)
    older, newer = write(training, TrainState(1)), write(training, TrainState(2))
    file = newer / "rank0.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    found = state.find(RunDirectory.of(training.run), ranks)
    assert (found.folder, found.state.step, found.damaged) == (older, 1, (newer,))
    assert "rank0.safetensors has another sha256" in found.notes[0]
