"""Compiled decoder layers: losses, parts and gradients of every method, and what stays as it was."""

from itertools import cycle

import pytest
import torch
from support.compare import figures
from torch._dynamo.backends.registry import lookup_backend
from transformers import AutoModelForCausalLM, GenerationConfig

from dskd.assemble import assemble, compile_models
from dskd.config.load import load_run
from dskd.losses import METHODS
from dskd.models import compilation
from dskd.models.compilation import as_written, compile_layers, decoder_layers
from dskd.models.views import ModelView
from dskd.teachers.resident import ResidentTeacher
from dskd.train import train, train_step

LAYERS = {"num_hidden_layers": 1}  # equal layers share what is compiled


@pytest.fixture
def graphs(monkeypatch, request):
    """What was compiled: traced anew, and as far as `request.param` goes; code is generated in tests/faults alone."""
    found, compiler = [], lookup_backend(request.param)
    torch._dynamo.reset()

    def remember(graph, inputs):
        found.append(graph)
        return compiler(graph, inputs)

    monkeypatch.setattr(compilation, "BACKEND", remember)
    monkeypatch.setattr(compilation, "DEVICES", ("cpu",))
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_the_layers_are_found(tiny, family):
    view = ModelView(AutoModelForCausalLM.from_pretrained(tiny(family)), "student.path")
    assert decoder_layers(view) == list(view.body.module.h if family == "gpt2" else view.body.module.layers)


@pytest.mark.parametrize("graphs", ["aot_eager"], indirect=True)  # with the backward pass as a graph of its own
def test_other_shapes_compile_nothing_more_and_names_stay(tiny, graphs):
    view = ModelView(AutoModelForCausalLM.from_pretrained(tiny("llama", **LAYERS)), "student.path")
    names = list(view.causal.state_dict())
    compile_layers(view)
    for shape in ((2, 7), (2, 9), (3, 5)):
        ids, mask = torch.randint(0, 200, shape), torch.ones(shape, dtype=torch.int64)
        mask[0, 3:] = 0
        found = []
        for context in (as_written(), torch.enable_grad()):
            with context:
                states = view.body.hidden(ids, mask)[mask.bool()]
                view.causal.zero_grad()
                states.square().sum().backward()
                found.append([states, *(p.grad for p in view.causal.parameters() if p.grad is not None)])
        for expected, actual in zip(*found, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * float(expected.detach().abs().max()))
        assert len(graphs) == 1, shape
    with as_written(), torch.no_grad():
        view.causal.generate(ids, generation_config=GenerationConfig(max_new_tokens=3, do_sample=False))
    assert len(graphs) == 1
    assert list(view.causal.state_dict()) == names


@pytest.mark.parametrize("graphs", ["eager"], indirect=True)
def test_losses_parts_and_gradients_of_every_method(make_run, tiny, tmp_path, ranks, graphs):
    """Under ZeRO 0, 1 and 2 in turn."""
    for kind, stage in zip(METHODS, cycle((0, 1, 2)), strict=False):
        (tmp_path / kind).mkdir()
        models = {"student": {"path": tiny("llama", **LAYERS)}}
        sections = {"train": {"global_batch_size": 4}, "engine": {"zero_stage": stage}}
        run = load_run(make_run(tmp_path / kind, method={"kind": kind}, **sections, **models))
        training = assemble(run, ranks)
        assert not training.notes
        before = {name: p.detach().clone() for name, p in training.distiller.named_parameters()}
        figures, gradients = [], []
        for context in (as_written(), torch.enable_grad()):
            with torch.no_grad():
                for name, p in training.distiller.named_parameters():
                    p.copy_(before[name])
            state = training.engine.optimizer.state
            state.clear()
            batches = [training.train(own) for own in training.plan.micro_batches(0, 0, 1)]
            with context:
                figures.append(train_step(training, 1, batches))
            gradients.append([s["exp_avg"] for s in state.values()])
        expected, actual = figures
        for name in ("loss", "accuracy", "grad_norm", *training.distiller.method.weights):
            assert actual[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-6)
        scale = max(float(g.abs().max()) for g in gradients[0])
        for wanted, found in zip(*gradients, strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * scale)
    assert len(graphs) == 4  # the student's, of each family of teachers, and of the check that anything compiles


@pytest.mark.parametrize(
    ("overrides", "broken", "told", "compiled"),
    [
        ([], False, [], [True, True]),
        (["engine.compile=off"], False, [], [False, False]),
        (
            [],
            True,
            ["engine.compile: nothing is compiled: backend='fail' raised: RuntimeError: no C compiler"],
            [False, False],
        ),
        (
            ["engine.zero_stage=3"],
            False,
            ["engine.compile: the student is not compiled under ZeRO-3, which shards its layers"],
            [False, True],
        ),
        (
            ["teacher.quantize=int8"],
            False,
            ["engine.compile: the teacher is not compiled: it is sharded or quantized"],
            [True, False],
        ),
    ],
)
def test_what_is_compiled_and_told(overrides, broken, told, compiled, make_run, tiny, tmp_path, ranks, monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("no C\ncompiler")

    monkeypatch.setattr(compilation, "DEVICES", ("cpu",))
    monkeypatch.setattr(compilation, "BACKEND", fail if broken else "eager")
    run = load_run(make_run(tmp_path), overrides)
    views = [ModelView(AutoModelForCausalLM.from_pretrained(tiny("llama")), "") for _ in range(2)]
    assert compile_models(run, views[0], ResidentTeacher(views[1]), ranks) == told
    states = [{layer._compiled_call_impl is not None for layer in decoder_layers(view)} for view in views]
    assert states == [{each} for each in compiled]


def test_nothing_is_compiled_without_a_gpu(make_run, tmp_path, ranks):
    training = assemble(load_run(make_run(tmp_path, method={"kind": "sft"})), ranks)
    assert not any(module._compiled_call_impl for module in training.distiller.modules())


@pytest.mark.parametrize("graphs", ["eager"], indirect=True)
def test_a_compiled_run_that_is_resumed_is_the_run_that_nothing_stopped_to_the_bit(
    make_run, tiny, tmp_path, ranks, graphs
):
    left = {}
    for name, stops in (("whole", [4]), ("stopped", [2, 4])):
        (tmp_path / name).mkdir()
        models = {"student": {"path": tiny("llama", **LAYERS)}}
        run_file = make_run(tmp_path / name, method={"kind": "sft"}, train={"schedule": "constant"}, **models)
        for steps in stops:
            directory = train(load_run(run_file, [f"train.max_steps={steps}"]), ranks)
        (saved,) = directory.glob("epoch1_step4_*")
        weights = (saved / "model.safetensors").read_bytes()
        left[name] = [line for line in figures(directory) if "dev_loss" not in line], weights
    assert len(left["whole"][0]) == 4
    assert left["stopped"] == left["whole"]
    expected = AutoModelForCausalLM.from_pretrained(tiny("llama", **LAYERS)).state_dict().keys()
    assert AutoModelForCausalLM.from_pretrained(saved).state_dict().keys() == expected
    assert graphs
