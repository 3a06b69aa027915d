"""Small cases of every method, and the comparison of their losses with the obvious form."""

import dataclasses

import torch

from dskd.config.methods import MethodConfig
from dskd.losses import METHODS
from dskd.losses.tensors import MethodContext, Tokens
from support.dense import dense_loss
from support.heads import Weights, means

HEADS = {"plain": {}, "scaled": {"scale": 0.5}, "soft-capped": {"softcap": 2.0}, "both": {"scale": 3.0, "softcap": 2.0}}
ONE_VOCABULARY = ("sft", "kd", "dskd", "dskd_v2")
D, WIDE = 6, 10


def tokens(lengths, vocabulary, width, dtype=torch.float32):
    count = sum(lengths)
    ids = torch.randint(vocabulary, (2, count))
    return Tokens(torch.randn(count, width).to(dtype).requires_grad_(), ids[0], ids[1], tuple(lengths))


def random_pairs(own, other):
    """Tokens aligned one to one, some samples without any."""
    pairs, starts = [], [0, 0]
    for a, b in zip(other.lengths, own.lengths, strict=True):
        count = int(torch.randint(min(a, b) + 1, ()))
        left, right = (torch.randperm(n)[:count].sort().values for n in (a, b))
        pairs.append(torch.stack([left + starts[0], right + starts[1]], 1))
        starts = [starts[0] + a, starts[1] + b]
    return torch.cat(pairs)


def case(kind, lengths, other_lengths, vocabularies, head=None, dtype=torch.float32, **chosen):
    """A method with everything that it needs."""
    if kind in ONE_VOCABULARY:
        vocabularies = (vocabularies[0], vocabularies[0])
        other_lengths = lengths
    head = head or {}
    student = Weights.random(vocabularies[0], D, dtype=dtype, **head)
    teacher = Weights.random(vocabularies[1], WIDE, dtype=dtype)
    own, other = tokens(lengths, vocabularies[0], D, dtype), tokens(other_lengths, vocabularies[1], WIDE, dtype)
    if kind in ONE_VOCABULARY:
        other = other._replace(labels=own.labels, inputs=own.inputs)
    other = other._replace(hidden=other.hidden.detach())
    teacher.weight.requires_grad_(False)
    student_ids = None
    if kind in ("mined", "dskd_v2_eta"):
        student_ids = torch.randint(-1, vocabularies[0], (vocabularies[1],))
        student_ids[0] = 0
        other = other._replace(pairs=random_pairs(own, other))
    known = {f.name for f in dataclasses.fields(MethodConfig.kinds[kind])}
    config = MethodConfig.kinds[kind](**{k: v for k, v in chosen.items() if k in known})
    method = METHODS[kind](config, MethodContext(student, teacher, 1, student_ids)).to(dtype)
    return method, student, teacher, own, other


def gradients(loss, method, student, own):
    leaves = [own.hidden, *student.trained(), *method.parameters()]
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]


def assert_streamed_is_dense(method, student, teacher, own, other):
    out = method(own, other, means(method))
    expected = dense_loss(method, student, teacher, own, other)
    assert {name: part.tokens for name, part in out.parts.items()} == {name: n for name, (_, n) in expected.items()}
    for name, (value, _) in expected.items():
        torch.testing.assert_close(out.parts[name].value, value.detach(), rtol=1e-5, atol=1e-5, check_dtype=False)
    loss = sum(method.weights[name] * value / max(n, 1) for name, (value, n) in expected.items())
    assert torch.isfinite(out.loss)
    for streamed, dense in zip(
        gradients(out.loss, method, student, own), gradients(loss, method, student, own), strict=True
    ):
        scale = max([1e-3, *dense.abs().flatten().tolist()])
        torch.testing.assert_close(streamed / scale, dense / scale, rtol=0, atol=1e-4)
