"""Losses and gradients equal to the original implementation's (tests/golden/dskd_v1.safetensors).

The files hold random inputs and what the original computed on them: DSKD at 077337a, fp32, CPU.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file

from dskd.config.methods import Divergence, DskdCmaConfig, KdConfig
from dskd.losses.divergence import distance
from dskd.losses.dskd_cma import DskdCma
from dskd.losses.kd import Kd
from dskd.losses.tensors import Head, Tokens

GOLDEN = load_file(Path(__file__).parents[1] / "golden" / "dskd_v1.safetensors")
DIVERGENCES = get_args(Divergence)
SETTINGS = {"temperature": 2.0, "kd_rate": 0.5, "skew": 0.1, "adaptive_alpha": 0.5}
MEMORY_MB = 1  # one chunk holds these small tensors; test_streaming.py compares several chunks with one


@dataclass
class Weights:
    """A model of which only its embeddings and head exist."""

    embeddings: torch.Tensor
    weight: torch.Tensor

    @property
    def hidden_size(self):
        return self.weight.shape[1]

    @property
    def vocab_size(self):
        return self.weight.shape[0]

    def head(self):
        return Head(self.weight)

    def embed(self, ids):
        return self.embeddings[ids]


def side(name):
    """Model and response tokens of one group, and which positions [B, S] they stand at."""
    g = {k.split(".", 1)[1]: v for k, v in GOLDEN.items() if k.startswith(f"{name}.")}
    at = g["labels"] != -100
    model = Weights(g["embed"], g["head"].clone().requires_grad_())
    hidden = g["hidden"][at].clone().requires_grad_()
    return model, Tokens(hidden, g["ids"][at], g["labels"][at], tuple(at.sum(1).tolist())), at


def assert_close_to(actual, expected, tolerance):
    scale = expected.abs().max().clamp_min(1e-12)
    assert float((actual.detach() - expected).abs().max() / scale) < tolerance


def assert_golden(group, method, student, teacher, model, at):
    out = method(student, teacher, method.weights)
    out.loss.backward()
    expected = {k.removeprefix(f"{group}."): v for k, v in GOLDEN.items() if k.startswith(f"{group}.")}
    assert_close_to(out.loss, expected["loss"], 1e-5)
    assert_close_to(out.parts["ce"], expected["ce"], 1e-5)
    assert_close_to(sum(v for k, v in out.parts.items() if k != "ce"), expected["kd"], 1e-5)
    assert_close_to(student.hidden.grad, expected["grad_hidden"][at], 1e-4)
    assert_close_to(model.weight.grad, expected["grad_head"], 1e-4)
    for name, parameter in method.named_parameters():
        assert_close_to(parameter.grad, expected[f"grad_proj.{name}"], 1e-4)
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
    method = Kd(KdConfig(divergence=name, **SETTINGS), model, teacher_model, MEMORY_MB)
    out = method(student, teacher, {"ce": 0.0, "kd": 1.0})
    out.loss.backward()
    assert_close_to(out.parts["kd"], GOLDEN[f"divergence.{name}.total"], 1e-5)
    grad_logits = GOLDEN[f"divergence.{name}.grad_student_logits"][at]
    assert_close_to(student.hidden.grad, grad_logits @ model.weight.detach(), 1e-4)
    assert_close_to(model.weight.grad, grad_logits.T @ student.hidden.detach(), 1e-4)
    assert_close_to(out.parts["ce"], GOLDEN["dskd.forward_kl.ce"], 1e-5)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_dskd_cma(name):
    (model, student, at), (teacher_model, teacher, _) = side("stu_full"), side("tea_full")
    method = DskdCma(DskdCmaConfig(divergence=name, **SETTINGS), model, teacher_model, MEMORY_MB)
    prefix = f"dskd_cma.{name}.proj."
    method.load_state_dict({k.removeprefix(prefix): v for k, v in GOLDEN.items() if k.startswith(prefix)})
    out, expected = assert_golden(f"dskd_cma.{name}", method, student, teacher, model, at)
    for part in ("t2s_ce", "t2s_kd", "s2t_kd"):
        assert_close_to(out.parts[part], expected[f"log.{part}_loss"], 1e-5)
    assert_close_to(out.metrics["t2s_accuracy"].value, expected["log.t2s_acc"].float(), 1e-6)
