"""However a global batch is cut into micro-batches: the same losses, parts and gradients."""

from dataclasses import replace

import pytest
import torch
from support.compare import figures

from dskd.assemble import assemble
from dskd.config.load import load_run
from dskd.losses import METHODS
from dskd.train import train, train_step


def first_step(training, plan, packed):
    """The figures of a first step, every gradient (as AdamW's first moment has a share of it), and the batches.

    Weights and optimizer are then what they were before.
    """
    own = dict(training.distiller.named_parameters())
    before = {name: p.detach().clone() for name, p in own.items()}
    training.train.packed = packed
    batches = [training.train(indices) for indices in plan.micro_batches(0, 0, 1)]
    found = train_step(training, 1, batches)
    moments = training.engine.optimizer.state
    gradients = {name: moments[p]["exp_avg"].clone() for name, p in own.items() if p in moments}
    moments.clear()
    with torch.no_grad():
        for name, p in own.items():
            p.copy_(before[name])
    return found, gradients, batches


@pytest.mark.parametrize("kind", METHODS)
def test_token_budgets_and_packing_change_no_loss_no_part_and_no_gradient(kind, make_run, tmp_path, ranks):
    sizes = {"global_batch_size": 8, "micro_batch_size": 8, "clip": 0}
    run = load_run(make_run(tmp_path, method={"kind": kind}, train=sizes), ["train.micro_batch_tokens=100"])
    training = assemble(run, ranks)
    assert training.train.packed
    expected, gradients, _ = first_step(training, replace(training.plan, budget=None), packed=False)
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    for packed in (False, True):
        budget = replace(training.plan.budget, packed=packed)
        found, own, batches = first_step(training, replace(training.plan, budget=budget), packed)
        assert len(batches) > 2
        assert all(max(side.input_ids.numel() for side in (b.student, b.teacher)) <= 100 for b in batches)
        assert found["padding"] == 0 if packed else 0 < found["padding"] < expected["padding"]
        for name in training.distiller.method.weights:
            assert found[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-6)
        assert own.keys() == gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(own[name], gradient, atol=1e-5 * largest, rtol=1e-5)


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


def test_a_model_that_cannot_do_without_padding_is_named_and_trains_with_it(make_run, tiny, tmp_path, ranks):
    run_file = make_run(
        tmp_path, student={"path": tiny("gemma2")}, method={"kind": "sft"}, train={"micro_batch_tokens": 100}
    )
    directory = train(load_run(run_file, ["train.max_steps=1"]), ranks)
    (note,) = (line for line in (directory / "train.log").read_text().splitlines() if "have padding" in line)
    assert "micro_batch_tokens: micro-batches have padding, since student.path, a Gemma2ForCausalLM, needs it" in note
    assert figures(directory)[0]["padding"] > 0
