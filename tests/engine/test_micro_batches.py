"""However a global batch is cut into micro-batches: the same losses, parts and gradients."""

from dataclasses import replace

import pytest
import torch
from support.compare import figures

from dskd.assemble import assemble
from dskd.config.load import load_run
from dskd.losses import METHODS
from dskd.train import train, train_step


def one_step(training, plan):
    """The figures of a first step, and every gradient, as a share of which AdamW's first moment begins."""
    for _, state in training.engine.optimizer.state.items():
        state.clear()
    batches = [training.train(own) for own in plan.micro_batches(0, 0, 1)]
    figures = train_step(training, 1, batches)
    state, names = training.engine.optimizer.state, training.distiller.named_parameters()
    return figures, {name: state[p]["exp_avg"].clone() for name, p in names if p in state}, batches


@pytest.mark.parametrize("kind", METHODS)
def test_token_budgets_change_no_loss_no_part_and_no_gradient(kind, make_run, tmp_path, ranks):
    run_file = make_run(
        tmp_path, method={"kind": kind}, train={"global_batch_size": 8, "micro_batch_size": 8, "clip": 0}
    )
    training = assemble(load_run(run_file, ["train.micro_batch_tokens=100"]), ranks)
    before = {name: p.detach().clone() for name, p in training.distiller.named_parameters()}
    expected, gradients, _ = one_step(training, replace(training.plan, budget=None))
    with torch.no_grad():
        for name, p in training.distiller.named_parameters():
            p.copy_(before[name])
    after, found, batches = one_step(training, training.plan)
    assert len(batches) > 2
    assert all(max(side.input_ids.numel() for side in (b.student, b.teacher)) <= 100 for b in batches)
    assert after["padding"] < expected["padding"]
    for name in training.distiller.method.weights:
        assert after[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-6)
    assert found.keys() == gradients.keys()
    scale = max(float(g.abs().max()) for g in gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5 * scale, rtol=1e-4)


def test_a_resumed_run_is_the_run_that_nothing_stopped_to_the_bit(make_run, tmp_path, ranks):
    """The lengths of records are found anew, and say the same."""
    left = {}
    for name, stops in (("whole", [4]), ("stopped", [2, 4])):
        (tmp_path / name).mkdir()
        sizes = {"global_batch_size": 8, "micro_batch_tokens": 100, "schedule": "constant"}
        run_file = make_run(tmp_path / name, train=sizes)
        for steps in stops:
            directory = train(load_run(run_file, [f"train.max_steps={steps}"]), ranks)
        weights = {file.name: file.read_bytes() for file in directory.glob("epoch1_step4_*/*.safetensors")}
        left[name] = [line for line in figures(directory) if "dev_loss" not in line], weights
    assert len(left["whole"][0]) == 4
    assert len(left["whole"][1]) == 2
    assert left["stopped"] == left["whole"]
