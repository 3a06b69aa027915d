"""A streamed loss equals the obvious one: value and every gradient, for any shape, head, type and chunk size."""

import dataclasses
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.dense import dense_loss
from support.heads import Weights, means

from dskd.config.methods import Divergence, MethodConfig
from dskd.losses import METHODS, streaming
from dskd.losses.streaming import chunk_size
from dskd.losses.tensors import MethodContext, Tokens

DIVERGENCES = get_args(Divergence)
HEADS = {"plain": {}, "scaled": {"scale": 0.5}, "soft-capped": {"softcap": 2.0}, "both": {"scale": 3.0, "softcap": 2.0}}
ONE_VOCABULARY = ("sft", "kd", "dskd", "dskd_v2")
D, WIDE = 6, 10


def tokens(lengths, vocabulary, width, dtype=torch.float32):
    count = sum(lengths)
    ids = torch.randint(vocabulary, (2, count))
    return Tokens(torch.randn(count, width).to(dtype).requires_grad_(), ids[0], ids[1], tuple(lengths))


def random_pairs(own, other, one_to_one):
    """Aligned tokens, some samples without any."""
    pairs, starts = [], [0, 0]
    for a, b in zip(other.lengths, own.lengths, strict=True):
        if one_to_one:
            count = int(torch.randint(min(a, b) + 1, ()))
            left, right = (torch.randperm(n)[:count].sort().values for n in (a, b))
        else:  # a path over all tokens of both, as time warping gives it
            count = max(a, b) if min(a, b) else 0
            left, right = (torch.arange(count).clamp_max(max(n - 1, 0)) for n in (a, b))
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
        other = other._replace(pairs=random_pairs(own, other, kind == "dskd_v2_eta"))
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
        torch.testing.assert_close(out.parts[name].value, value.detach(), rtol=2e-5, atol=2e-5, check_dtype=False)
    loss = sum(method.weights[name] * value / max(n, 1) for name, (value, n) in expected.items())
    assert torch.isfinite(out.loss)
    for streamed, dense in zip(
        gradients(out.loss, method, student, own), gradients(loss, method, student, own), strict=True
    ):
        scale = max([1e-3, *dense.abs().flatten().tolist()])
        torch.testing.assert_close(streamed / scale, dense / scale, rtol=0, atol=1e-4)


lengths_of = st.lists(st.integers(0, 6), min_size=1, max_size=3)


@pytest.mark.parametrize("kind", METHODS)
@settings(max_examples=60)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=3),
    vocabularies=st.tuples(st.integers(2, 40), st.integers(2, 40)),
    head=st.sampled_from(list(HEADS.values())),
    bias=st.booleans(),
    chunk=st.integers(1, 7),
    block=st.integers(1, 100),
    divergence=st.sampled_from(DIVERGENCES),
    label_smoothing=st.sampled_from([0.0, 0.1]),
    teacher_temperature=st.sampled_from([1.0, 1.5]),
    options=st.sampled_from([{}, {"agreement_mask": False}, {"projector_init": "random"}]),
    seed=st.integers(0, 2**20),
)
def test_streamed_is_dense(
    kind,
    lengths,
    vocabularies,
    head,
    bias,
    chunk,
    block,
    divergence,
    label_smoothing,
    teacher_temperature,
    options,
    seed,
):
    torch.manual_seed(seed)
    own, other = zip(*lengths, strict=True)
    made = case(
        kind,
        own,
        other,
        vocabularies,
        head | {"bias": bias},
        divergence=divergence,
        label_smoothing=label_smoothing,
        teacher_temperature=teacher_temperature,
        **options,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming, "CHUNK_TOKENS", chunk)
        patch.setattr(streaming, "BLOCK_CELLS", {"cpu": block})
        assert_streamed_is_dense(*made)


@pytest.mark.parametrize("kind", METHODS)
def test_bf16_is_fp32_up_to_rounding(kind):
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(4)
        method, _, _, own, other = case(kind, (9, 4), (5, 6), (50, 60), dtype=dtype)
        out = method(own, other, means(method))
        out.loss.backward()
        assert own.hidden.grad.dtype == dtype
        found.append((out.loss.detach(), own.hidden.grad.float()))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=0.05, atol=0.05)
    cosine = torch.nn.functional.cosine_similarity(found[0][1].flatten(), found[1][1].flatten(), 0)
    assert cosine > 0.9


@pytest.mark.parametrize("kind", METHODS)
def test_a_frozen_head_gets_no_gradient_and_costs_no_product(kind, monkeypatch):
    """As with LoRA."""
    torch.manual_seed(5)
    method, student, _, own, other = case(kind, (9, 4), (5, 6), (50, 60))
    student.weight.requires_grad_(False)
    made = []
    monkeypatch.setattr(
        streaming.StreamedLogits,
        "gradients",
        lambda self, scale=1.0, f=streaming.StreamedLogits.gradients: made.append(self.grad_weight) or f(self, scale),
    )
    method(own, other, means(method)).loss.backward()
    assert student.weight.grad is None
    assert made
    assert all(grad is None for grad in made)
    assert own.hidden.grad.abs().sum() > 0


def test_the_chunk_follows_the_memory_budget():
    assert chunk_size(10_000, 90, [50257]) == 90 * 2**20 // (4 * 50257)
    assert chunk_size(10_000, 90, [50257, 151936]) == 90 * 2**20 // (4 * (50257 + 151936))
    assert chunk_size(10_000, 10**6, [50257]) == streaming.CHUNK_TOKENS
    assert chunk_size(3, 10**6, [50257]) == 3
    assert chunk_size(10_000, 1, [10**9]) == 1


def test_label_smoothing_is_torch_s():
    torch.manual_seed(6)
    method, student, _, own, _ = case("sft", (7,), (7,), (30, 30), label_smoothing=0.3)
    value = method(own, None, means(method)).loss
    expected = torch.nn.functional.cross_entropy(student.logits(own.hidden), own.labels, label_smoothing=0.3)
    torch.testing.assert_close(value, expected)
