"""One training step, in this process: what it never allocates, what stops it, how a method is added."""

import json
import math
from dataclasses import dataclass, replace

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from dskd.assemble import assemble
from dskd.config.errors import UserError
from dskd.config.load import load_run
from dskd.config.methods import MethodConfig
from dskd.config.training import TrainConfig
from dskd.data.batch import Side
from dskd.losses import METHODS
from dskd.losses.kernels import Scales, Terms, kernels_for
from dskd.losses.method import Method, finish
from dskd.losses.streaming import StreamedLogits, stream
from dskd.losses.tensors import Sum
from dskd.rundir.layout import RunDirectory
from dskd.rundir.train_state import TrainState
from dskd.train import evaluate_if_due, learning_rates, train, train_step


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def long_records(folder, count=8):
    """Like Dolly at max_length 512: prompts fill three quarters, responses one."""
    words = ["river", "stone", "light", "garden", "seven", "winter", "music", "paper"]
    for name in ("train", "dev"):
        with (folder / f"{name}.jsonl").open("w") as out:
            for i in range(count):
                prompt = " ".join(words[(i + j) % 8] for j in range(600))
                answer = " ".join(words[(i * j) % 8] for j in range(600))
                out.write(json.dumps({"prompt": prompt, "output": answer}) + "\n")


@pytest.mark.parametrize("kind", METHODS)
def test_no_tensor_of_batch_times_length_times_vocabulary(kind, make_run, tmp_path, ranks):
    sizes = {"train": {"global_batch_size": 4, "micro_batch_size": 4}, "engine": {"loss_memory_mb": 1}}
    run_file = make_run(tmp_path, method={"kind": kind}, **sizes)
    long_records(tmp_path)
    run = load_run(run_file, ["data.max_length=512", "data.max_prompt_length=384", "data.workers=0"])
    training = assemble(run, ranks)
    batch = training.train(training.plan.micro_batches(0, 0, 1)[0])
    assert batch.student.input_ids.shape == (4, 512)
    train_step(training, 1, [batch])  # the first step also makes the optimizer's state
    with Largest() as largest:
        train_step(training, 2, [batch])
    widths = [training.ends.vocab_size, *([] if training.teacher is None else [training.teacher.ends.vocab_size])]
    assert largest.numel < 4 * 512 * min(widths)


def test_a_non_finite_loss_stops_the_run_before_the_weights_are_touched(make_run, tmp_path, ranks):
    run_file = make_run(tmp_path, method={"kind": "dskd_cma"}, train={"global_batch_size": 8, "micro_batch_size": 4})
    training = assemble(load_run(run_file), ranks)
    batches = [training.train(indices) for indices in training.plan.micro_batches(0, 0, 1)]
    with torch.no_grad():
        training.distiller.method.t2s.weight.fill_(math.inf)
    before = {name: p.detach().clone() for name, p in training.distiller.student.named_parameters()}
    records = ", ".join(map(str, sorted(i for b in batches for i in b.records)))
    with pytest.raises(
        UserError, match=rf"step 1: the loss is not finite in part .*t2s_ce.*training records {records} "
    ):
        train_step(training, 1, batches)
    after = dict(training.distiller.student.named_parameters())
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("settings", [{"zero_stage": 0, "precision": "fp32"}, {"zero_stage": 2, "precision": "bf16"}])
def test_a_gradient_that_is_not_finite_stops_the_run_before_anything_is_saved(make_run, tmp_path, ranks, settings):
    run_file = make_run(tmp_path, method={"kind": "sft"}, train={"global_batch_size": 8}, engine=settings)
    training = assemble(load_run(run_file), ranks)
    weight = next(training.distiller.student.parameters())
    weight.register_hook(lambda gradient: gradient * math.nan)
    batches = [training.train(indices) for indices in training.plan.micro_batches(0, 0, 1)]
    with pytest.raises(UserError, match=r"^step 1: the gradient \(norm .*\) is not finite; nothing is saved"):
        train_step(training, 1, batches)


def test_a_dev_loss_that_is_not_finite_makes_no_best_model(make_run, tmp_path, ranks):
    training = assemble(load_run(make_run(tmp_path, method={"kind": "sft"})), ranks)
    with torch.no_grad():
        next(training.distiller.student.parameters()).fill_(math.nan)
    last = TrainState(step=training.length.total_steps, pending=True)
    with pytest.raises(UserError, match=r"^step 5: the dev loss is not finite; nothing is saved of it"):
        evaluate_if_due(training, None, None, last)
    assert not RunDirectory.of(training.run).path.exists()


def test_parts_are_means_over_the_global_batch_however_it_is_cut(make_run, tmp_path, ranks):
    figures = []
    for micro in (2, 8):
        run_file = make_run(tmp_path, method={"kind": "kd"}, train={"global_batch_size": 8, "micro_batch_size": micro})
        training = assemble(load_run(run_file), ranks)
        batches = [training.train(indices) for indices in training.plan.micro_batches(0, 0, 1)]
        figures.append([train_step(training, step, batches) for step in (1, 2)])
    for a, b in zip(*figures, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_a_method_for_one_vocabulary_refuses_two(make_run, tiny, tmp_path, ranks):
    run_file = make_run(tmp_path, method={"kind": "kd"}, teacher={"path": tiny("qwen2")})
    with pytest.raises(
        UserError,
        match=r"^method\.kind: kd needs one vocabulary, .* methods for two: dskd_cma, dskd_v2_eta, mined, uld$",
    ):
        assemble(load_run(run_file), ranks)


@pytest.mark.parametrize("kind", ["uld", "mined", "dskd_cma", "dskd_v2_eta"])
def test_a_method_for_two_vocabularies_runs_with_one_and_says_so(kind, make_run, tiny, tmp_path, ranks):
    run_file = make_run(tmp_path, method={"kind": kind}, teacher={"path": tiny("mistral")}, train={"max_steps": 2})
    directory = train(load_run(run_file), ranks)
    log = (directory / "train.log").read_text()
    assert f"method.kind: {kind} is for two vocabularies" in log
    assert "dskd, dskd_v2, kd fit" in log
    figures = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert all(math.isfinite(value) for step in figures for value in step.values())


@pytest.mark.parametrize("kind", ["uld", "mined", "dskd_v2_eta"])
def test_without_any_aligned_token_the_loss_is_finite_and_a_metric_tells(kind, make_run, tmp_path, ranks):
    training = assemble(load_run(make_run(tmp_path, method={"kind": kind})), ranks)
    batches = [training.train(indices) for indices in training.plan.micro_batches(0, 0, 1)]
    usual = train_step(training, 1, batches)
    assert 0 < usual["aligned_tokens"] <= 1
    assert usual["samples_without_alignment"] < 1
    nothing = torch.empty((0, 2), dtype=torch.int64)
    empty = Side(*(torch.zeros(2, 1, dtype=torch.int64),) * 2, *(torch.empty(0, dtype=torch.int64),) * 3, (0, 0))
    batches = [replace(b, pairs=nothing, teacher=empty if kind == "uld" else b.teacher) for b in batches]
    figures = train_step(training, 2, batches)
    assert all(math.isfinite(value) for value in figures.values())
    assert figures["aligned_tokens"] == 0
    assert figures["samples_without_alignment"] == 1


def test_projectors_alone_are_trained_and_taken_over(make_run, tmp_path, ranks):
    run_file = make_run(tmp_path, method={"kind": "dskd_cma", "projectors_only": True}, train={"max_steps": 2})
    training = assemble(load_run(run_file), ranks)
    before = {name: p.detach().clone() for name, p in training.distiller.named_parameters()}
    train_step(training, 1, [training.train(indices) for indices in training.plan.micro_batches(0, 0, 1)])
    for name, parameter in training.distiller.named_parameters():
        assert torch.equal(parameter, before[name]) == name.startswith("student."), name
    directory = train(load_run(run_file), ranks)
    (saved,) = directory.glob("epoch*")
    second = make_run(tmp_path, method={"kind": "dskd_cma", "projectors_from": saved}, output={"name": "second"})
    method = assemble(load_run(second), ranks).distiller.method
    expected = load_file(saved / "projectors.safetensors")
    assert {name for name, _ in method.named_parameters()} == set(expected)
    assert all(torch.equal(p.detach().cpu(), expected[name]) for name, p in method.named_parameters())
    other = make_run(tmp_path, method={"kind": "dskd", "projectors_from": saved}, output={"name": "third"})
    with pytest.raises(UserError, match=r"^method\.projectors_from: .*projectors\.safetensors does not fit: .*query"):
        assemble(load_run(other), ranks)
    with pytest.raises(UserError, match=r"^method\.projectors_from: no projectors\.safetensors in "):
        assemble(load_run(other, [f"method.projectors_from={tmp_path}"]), ranks)


def test_a_method_is_added_from_outside(make_run, tmp_path, ranks, monkeypatch):
    """One class, its settings, one line in the table."""
    monkeypatch.setattr(MethodConfig, "kinds", dict(MethodConfig.kinds))

    @dataclass(frozen=True)
    class ToyConfig(MethodConfig, kind="toy", teacher="none"):
        """Cross-entropy, weighed."""

        weight: float = 1.0
        """Weight."""

    class Toy(Method):
        def __init__(self, settings, context):
            super().__init__(settings, context)
            self.weights = {"ce": settings.weight}

        def forward(self, student, teacher, scale_parts):
            count, total = len(student.labels), torch.zeros(())
            scales = scale_parts({"ce": count})
            streamed = StreamedLogits(student.hidden, self.student.head(), head_memory_mb=self.memory_mb)
            kernels = kernels_for(streamed.weight)
            for rows, (own,) in stream(range(count), self.memory_mb, kernels, streamed):
                found = kernels.measure(own, None, Terms(student.labels[rows]))
                total += found.ce.sum()
                found.write(Scales(ce=scales["ce"]))
            return finish({"ce": Sum(total, count)}, scales, streamed.gradients(), {})

    monkeypatch.setitem(METHODS, "toy", Toy)
    sizes = {"max_steps": 3, "global_batch_size": 8}
    run = load_run(make_run(tmp_path, method={"kind": "sft"}, train=sizes), ["method={kind: toy, weight: 2.0}"])
    directory = train(run, ranks)
    plain = train(replace(run, method=MethodConfig.kinds["sft"]()), ranks)
    toy, sft = ([json.loads(x) for x in (d / "metrics.jsonl").read_text().splitlines()] for d in (directory, plain))
    assert toy[0]["loss"] == pytest.approx(2 * sft[0]["loss"], rel=1e-5)
    assert toy[2]["loss"] < toy[0]["loss"]


def test_learning_rates():
    cosine = TrainConfig(lr=0.5, projector_lr=1.0)
    assert learning_rates(cosine, 1, 100) == {"lr": 0.5, "projector_lr": 1.0}
    assert learning_rates(cosine, 51, 100)["lr"] == pytest.approx(0.25)
    warm = TrainConfig(lr=1.0, warmup_ratio=0.1, schedule="linear")
    assert [learning_rates(warm, step, 100)["lr"] for step in (1, 10, 11, 56)] == pytest.approx([0.1, 1.0, 1.0, 0.5])
    assert learning_rates(TrainConfig(lr=1.0, schedule="constant"), 100, 100)["lr"] == 1.0


def test_a_refused_run_leaves_nothing(make_run, tiny, tmp_path, ranks):
    run_file = make_run(tmp_path, method={"kind": "kd"}, teacher={"path": tiny("qwen2")})
    there = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=r"^method\.kind: kd needs one vocabulary"):
        train(load_run(run_file), ranks)
    assert sorted(tmp_path.rglob("*")) == there


def test_how_many_records_are_cut_is_told_at_the_start(make_run, tmp_path, ranks):
    cut = {"max_length": 20, "max_prompt_length": 16}
    run = load_run(make_run(tmp_path, train={"max_steps": 1}, data=cut))
    train(run, ranks)
    told = [line for line in RunDirectory.of(run).log.read_text().splitlines() if "records looked at" in line]
    assert [line.split()[2] for line in told] == ["student:", "teacher:"]
    assert "of 40 records looked at, 5 lose the beginning of their prompt (data.max_prompt_length 16)" in told[0]
