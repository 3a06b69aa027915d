"""Layers compiled by inductor into code for this processor, which takes a minute: steps equal those as written."""

import shutil

import pytest
import torch

from dskd.assemble import assemble
from dskd.config.load import load_run
from dskd.models import compilation
from dskd.models.compilation import decoder_layers
from dskd.models.views import ModelView
from dskd.train import train_step

pytestmark = [
    pytest.mark.faults,
    pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles for a CPU with g++"),
]


def test_steps_through_inductor_are_those_without_it(make_run, tiny, tmp_path, ranks, monkeypatch):
    """Three steps of dskd in fp32, with both models compiled as they are on a GPU."""
    monkeypatch.setattr(compilation, "DEVICES", ("cpu",))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    models = {"student": {"path": tiny("llama", num_hidden_layers=1)}}  # equal layers share what is compiled
    run_file = make_run(tmp_path, method={"kind": "dskd"}, train={"global_batch_size": 4}, **models)
    figures, gradients = [], []
    for compiles in ("off", "auto"):
        torch._dynamo.reset()
        training = assemble(load_run(run_file, [f"engine.compile={compiles}"]), ranks)
        assert not training.notes
        for view in (ModelView(training.distiller.student, ""), training.teacher.view):
            compiled = [layer._compiled_call_impl is not None for layer in decoder_layers(view)]
            assert set(compiled) == {compiles == "auto"}
        batches = [[training.train(own) for own in training.plan.micro_batches(step, 0, 1)] for step in range(3)]
        with torch._inductor.config.patch(compile_threads=1):  # in this process
            figures.append([train_step(training, step, own) for step, own in enumerate(batches, start=1)])
        gradients.append([state["exp_avg"] for state in training.engine.optimizer.state.values()])
    assert list((tmp_path / "inductor").rglob("*.so"))
    for expected, actual in zip(*figures, strict=True):
        for name in ("loss", "accuracy", "grad_norm", *training.distiller.method.weights):
            assert actual[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-6)
    scale = max(float(g.abs().max()) for g in gradients[0])  # of the gradients of all steps
    for wanted, found in zip(*gradients, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * scale)
