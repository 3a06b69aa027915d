"""Losses and gradients equal to the original implementations' (tests/golden/*.safetensors).

The files hold random inputs and what the originals computed on them: DSKD at 077337a, DSKDv2 at 5025279, fp32, CPU.
"""

import json
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file
from support.heads import Weights, sums

from dskd.config.methods import (
    Divergence,
    DskdCmaConfig,
    DskdConfig,
    DskdV2Config,
    DskdV2EtaConfig,
    KdConfig,
    UldConfig,
)
from dskd.losses.distances import distance
from dskd.losses.dskd import Dskd
from dskd.losses.dskd_cma import DskdCma
from dskd.losses.dskd_v2 import DskdV2
from dskd.losses.kd import Kd
from dskd.losses.tensors import MethodContext, Tokens
from dskd.losses.uld import Uld

FOLDER = Path(__file__).parents[1] / "golden"
GOLDEN, V2, ETA = (load_file(FOLDER / f"{name}.safetensors") for name in ("dskd_v1", "dskd_v2", "dskd_v2_eta"))
DIVERGENCES = get_args(Divergence)
SETTINGS = {"temperature": 2.0, "kd_rate": 0.5, "skew": 0.1, "adaptive_alpha": 0.5}
MEMORY_MB = 1  # one chunk holds these small tensors; test_streaming.py compares several chunks with one


def side(name, golden=GOLDEN):
    """Model and response tokens of one group, and which positions [B, S] they stand at."""
    g = group(golden, name)
    at = g["labels"] != -100
    model = Weights(g["embed"], g["head"].clone().requires_grad_())
    hidden = g["hidden"][at].clone().requires_grad_()
    return model, Tokens(hidden, g["ids"][at], g["labels"][at], tuple(at.sum(1).tolist())), at


def group(golden, name):
    return {k.removeprefix(f"{name}."): v for k, v in golden.items() if k.startswith(f"{name}.")}


def assert_close_to(actual, expected, tolerance):
    scale = expected.abs().max().clamp_min(1e-12)
    assert float((actual.detach() - expected).abs().max() / scale) < tolerance


def assert_golden(name, method, student, teacher, model, at):
    """The first paper's: sums, not means."""
    out = method(student, Tokens(teacher.hidden.detach(), *teacher[1:]), sums(method))
    out.loss.backward()
    expected = group(GOLDEN, name)
    assert_close_to(out.loss, expected["loss"], 1e-5)
    assert_close_to(out.parts["ce"].value, expected["ce"], 1e-5)
    assert_close_to(sum(v.value for k, v in out.parts.items() if k != "ce"), expected["kd"], 1e-5)
    assert_close_to(student.hidden.grad, expected["grad_hidden"][at], 1e-4)
    assert_close_to(model.weight.grad, expected["grad_head"], 1e-4)
    for key, parameter in method.named_parameters():
        assert_close_to(parameter.grad, expected[f"grad_proj.{key}"], 1e-4)
    return out, expected


@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergence(name):
    (model, student, at), (teacher_model, teacher, _) = side("stu"), side("tea_same")
    logits, target = student.hidden @ model.weight.T, teacher.hidden @ teacher_model.weight.T
    with torch.no_grad():
        value, grad = distance(KdConfig(divergence=name, **SETTINGS))(logits, target)
    assert_close_to(value, GOLDEN[f"divergence.{name}.per_token"][at], 1e-5)
    assert_close_to(grad, GOLDEN[f"divergence.{name}.grad_student_logits"][at], 1e-4)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_kd_is_the_divergence_beside_cross_entropy(name):
    (model, student, at), (teacher_model, teacher, _) = side("stu"), side("tea_same")
    method = Kd(KdConfig(divergence=name, **SETTINGS), MethodContext(model, teacher_model, MEMORY_MB))
    out = method(student, teacher, lambda counts: {"ce": 0.0, "kd": 1.0})
    out.loss.backward()
    assert_close_to(out.parts["kd"].value, GOLDEN[f"divergence.{name}.total"], 1e-5)
    grad_logits = GOLDEN[f"divergence.{name}.grad_student_logits"][at]
    assert_close_to(student.hidden.grad, grad_logits @ model.weight.detach(), 1e-4)
    assert_close_to(model.weight.grad, grad_logits.T @ student.hidden.detach(), 1e-4)
    assert_close_to(out.parts["ce"].value, GOLDEN["dskd.forward_kl.ce"], 1e-5)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize(
    ("kind", "config", "sides"),
    [(Dskd, DskdConfig, ("stu", "tea_same")), (DskdCma, DskdCmaConfig, ("stu_full", "tea_full"))],
)
def test_dual_space(kind, config, sides, name):
    (model, student, at), (teacher_model, teacher, _) = map(side, sides)
    method = kind(config(divergence=name, **SETTINGS), MethodContext(model, teacher_model, MEMORY_MB))
    golden = f"{config.kind}.{name}"
    projectors = group(GOLDEN, f"{golden}.proj")
    method.load_state_dict({key: projectors[key] for key in method.state_dict()})
    out, expected = assert_golden(golden, method, student, teacher, model, at)
    for part in ("t2s_ce", "t2s_kd", "s2t_kd"):
        assert_close_to(out.parts[part].value, expected[f"log.{part}_loss"], 1e-5)
    assert_close_to(out.metrics["t2s_accuracy"].value, expected["log.t2s_acc"].float(), 1e-6)


@pytest.mark.parametrize(("name", "teacher_name"), [("uld", "tea_diff"), ("uld_same", "tea_same")])
def test_uld(name, teacher_name):
    (model, student, at), (teacher_model, teacher, _) = side("stu"), side(teacher_name)
    assert_golden(name, Uld(UldConfig(), MethodContext(model, teacher_model, MEMORY_MB)), student, teacher, model, at)


def v2_settings(config, divergence, variant):
    init = "random" if variant == "random" else "pseudo_inverse"
    return config(divergence=divergence, projector_init=init, agreement_mask=variant != "init_agree0", **SETTINGS)


def assert_v2(golden, name, method, student, teacher, model, at):
    """The successor's: each part a mean over its own tokens. `kd` is all but cross-entropy; gradients are of `kd`."""
    expected = group(golden, name)
    with torch.no_grad():
        if method.s2t is None:  # then t2s follows from the heads, and s2t does in each step
            assert_close_to(method.t2s.weight, expected["t2s"], 1e-5)
        else:
            method.s2t.weight.copy_(expected["s2t"])
            method.t2s.weight.copy_(expected["t2s"])
    weights = {"ce": 0.0, "t2s_ce": 1.0, "t2s_kd": 1.0, "s2t_kd": 1.0}
    teacher = Tokens(teacher.hidden.detach(), *teacher[1:])
    found = {}

    def scale_parts(counts):
        found.update(counts)
        return {part: weight / max(counts[part], 1) for part, weight in weights.items()}

    out = method(student, teacher, scale_parts)
    out.loss.backward()
    assert_close_to(out.loss, expected["kd"], 1e-5)
    for part in ("t2s_ce", "t2s_kd", "s2t_kd"):
        mean = out.parts[part].value / max(out.parts[part].tokens, 1)
        assert_close_to(mean, expected[f"log.{part}_loss"], 1e-5)
    assert_close_to(student.hidden.grad, expected["grad_hidden"][at], 1e-4)
    assert_close_to(model.weight.grad, expected["grad_head"], 1e-4)
    for key, parameter in method.named_parameters():
        assert_close_to(parameter.grad, expected[f"grad_{key.removesuffix('.weight')}"], 1e-4)
    assert method.count_ahead(teacher) == {part: count for part, count in found.items() if part != "ce"}


VARIANTS = ["init", "init_agree0", "random"]


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "js_divergence"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_dskd_v2(variant, divergence):
    (model, student, at), (teacher_model, teacher, _) = side("stu", V2), side("tea_same", V2)
    method = DskdV2(v2_settings(DskdV2Config, divergence, variant), MethodContext(model, teacher_model, MEMORY_MB))
    assert_v2(V2, f"dskd_v2.{divergence}.{variant}", method, student, teacher, model, at)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_dskd_v2_eta(variant, divergence):
    (model, student, at), (teacher_model, teacher, _) = side("stu", ETA), side("tea", ETA)
    made = json.loads((FOLDER / "dskd_v2_eta.json").read_text())
    of_student = {token: index for index, token in enumerate(made["student_vocab"])}
    student_ids = torch.tensor([of_student.get(token, -1) for token in made["teacher_vocab"]])
    teacher_starts, student_starts = ([0, *torch.tensor(s.lengths).cumsum(0)] for s in (teacher, student))
    pairs = [[t + teacher_starts[i], s + student_starts[i]] for i, t, s in ETA["alignment.pairs"].tolist()]
    teacher = teacher._replace(pairs=torch.tensor(pairs))
    settings = v2_settings(DskdV2EtaConfig, divergence, variant)
    method = DskdV2(settings, MethodContext(model, teacher_model, MEMORY_MB, student_ids))
    assert_v2(ETA, f"dskd_v2_eta.{divergence}.{variant}", method, student, teacher, model, at)
