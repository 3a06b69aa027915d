"""Triton kernels equal the dense fp32 form, run by Triton's interpreter on the CPU."""

from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cases import HEADS, assert_streamed_is_dense, case
from support.dense import distance as dense_distance
from support.heads import means
from torch.nn.functional import cross_entropy, pad
from triton.runtime.interpreter import InterpreterBuilder

from dskd.config.methods import Divergence, KdConfig
from dskd.losses import METHODS, kernels
from dskd.losses.distances import Carried, Sorted, ToLabel, distance
from dskd.losses.kernels import Block, Scales, Terms, fused
from dskd.losses.tensors import Head

DIVERGENCES = get_args(Divergence)
DISTANCES = (*DIVERGENCES, "label", "sorted", "carried")
# bf16 has eight bits of significand, so that neighbours differ by up to 2**-7 of their size. The interpreter cuts the
# rest off, which moves a number by less than that; a GPU rounds to the nearest and moves it by half.
ROUNDING = 2**-7

# Lanes beyond a row hold -inf, whose differences are NaN until they are left out.
pytestmark = pytest.mark.filterwarnings("ignore:.*:RuntimeWarning")


@pytest.fixture(autouse=True, scope="module")
def small_blocks():
    """The kernels on this device, in blocks so small that a row takes several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "FUSED", ("cpu",))
        for name, size in {"BLOCK": 16, "SEARCH_BLOCK": 16, "CARRY_CELLS": 4}.items():
            patch.setattr(fused, name, size)
        yield


@pytest.mark.parametrize("kind", METHODS)
@settings(max_examples=5)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=2),
    vocabularies=st.tuples(st.integers(2, 40), st.integers(2, 40)),
    head=st.sampled_from(list(HEADS.values())),
    bias=st.booleans(),
    chunk=st.integers(1, 7),
    divergence=st.sampled_from(DIVERGENCES),
    label_smoothing=st.sampled_from([0.0, 0.1]),
    teacher_temperature=st.sampled_from([1.0, 1.5]),
    options=st.sampled_from([{}, {"agreement_mask": False}, {"projector_init": "random"}]),
    seed=st.integers(0, 2**20),
)
def test_a_method_is_dense(kind, lengths, vocabularies, head, bias, chunk, seed, options, **chosen):
    """In fp32; `uld` takes the plain form there."""
    torch.manual_seed(seed)
    own, other = zip(*lengths, strict=True)
    made = case(kind, own, other, vocabularies, head | {"bias": bias}, **chosen, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "CHUNK_TOKENS", chunk)
        assert_streamed_is_dense(*made)


def logits_of(product, head):
    logits = product.float() * head.scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def sorted_distance(logits, teacher_logits):
    wide = max(logits.shape[-1], teacher_logits.shape[-1])
    p, q = (pad(x.softmax(-1), (0, wide - x.shape[-1])).sort(-1).values for x in (logits, teacher_logits))
    return (p - q).abs().sum(-1)


def carried_distance(run, carried, logits, teacher_logits):
    q = (teacher_logits / carried.divergence.teacher_divisor).softmax(-1)
    target_of_source = carried.targets.repeat_interleave(carried.runs)
    q = torch.zeros(len(q), logits.shape[-1]).index_add(1, target_of_source, q[:, carried.sources])
    teacher = q[:, carried.targets].log() * carried.divergence.teacher_divisor
    return dense_distance(run, logits[:, carried.targets], teacher)


@pytest.mark.parametrize("name", DISTANCES)
@settings(max_examples=5)
@given(
    n=st.integers(1, 2),
    widths=st.tuples(st.integers(2, 40), st.integers(2, 40)),
    shapes=st.tuples(*[st.sampled_from(list(HEADS.values()))] * 2),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    smoothing=st.sampled_from([0.0, 0.1]),
    learn=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_a_block_is_dense(name, n, widths, shapes, dtype, smoothing, learn, seed):
    """Every term and its gradient, on the very logits that the kernels see.

    Sums are in fp32, so values are exact to 1e-5 from bf16 logits too, and a gradient is rounded once, when it is
    written. Only a teacher's probabilities that are carried together are rounded in between, as bf16 logits: their
    logarithm moves by at most ROUNDING of the largest logit, and a gradient by twice that.
    """
    torch.manual_seed(seed)
    dtype = torch.bfloat16 if name == "sorted" else dtype
    width, teacher_width = widths
    both = name in DIVERGENCES and seed % 2 == 0  # a teacher's side with labels of its own has one width with the other
    teacher_width = width if both else teacher_width
    heads = [Head(torch.zeros(w, 1, dtype=dtype), **s) for w, s in zip((width, teacher_width), shapes, strict=True)]
    student, teacher = (
        Block(fused.buffer(n, head.weight).copy_(3 * torch.randn(n, len(head.weight))), head, trained=True)
        for head in heads
    )
    labels, teacher_labels = torch.randint(width, (n,)), torch.randint(teacher_width, (n,))
    run = KdConfig(divergence=name if name in DIVERGENCES else "forward_kl", teacher_temperature=1.5)
    logits, teacher_logits = (logits_of(x.logits, x.head).requires_grad_() for x in (student, teacher))
    shared, between = min(widths[0], teacher_width), teacher_logits.detach()
    match name:
        case "label":
            asked, expected = ToLabel(2.0), cross_entropy(logits / 2, labels, reduction="none")
        case "sorted":
            asked, expected = Sorted(), sorted_distance(logits, between)
        case "carried":
            targets = torch.randint(width, (teacher_width,)).sort().values
            runs = torch.bincount(targets)
            asked = Carried(distance(run), runs.nonzero().squeeze(-1), torch.randperm(teacher_width), runs[runs > 0])
            expected = carried_distance(run, asked, logits, between)
        case _:
            asked, expected = distance(run), dense_distance(run, logits[:, :shared], between[:, :shared])
    weights = torch.rand(n) if learn else torch.ones(n)
    ce = cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
    teacher_ce = cross_entropy(teacher_logits, teacher_labels, reduction="none") if both else torch.zeros(n)
    (0.3 * ce + 0.7 * weights * expected + 0.2 * teacher_ce).sum().backward()

    terms = Terms(labels, smoothing=smoothing, distance=asked, predictions=both)
    if both:
        terms = Terms(labels, True, smoothing, asked, True, teacher_labels)
    found = fused.measure(student, None if name == "label" else teacher, terms)
    found.write(Scales(0.3, 0.7, weights if learn else None, 0.2))
    between_rounding = 0.0
    if name == "carried" and dtype == torch.bfloat16:
        between_rounding = ROUNDING * float(between.abs().max()) / asked.divergence.teacher_divisor
    torch.testing.assert_close(found.ce, ce.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.distance, expected.detach(), rtol=1e-5, atol=1e-5 + 2 * between_rounding)
    # A soft-cap can make two logits equal within rounding.
    at_label, others = logits.gather(1, labels[:, None])[:, 0], logits.detach().scatter(1, labels[:, None], -torch.inf)
    margin, correct = at_label - others.amax(-1), found.correct.bool()
    assert correct[margin > 1e-5].all()
    assert not correct[margin < -1e-5].any()
    if both:
        at = teacher_logits.gather(1, found.predictions[:, None])[:, 0]
        torch.testing.assert_close(at, teacher_logits.amax(-1), rtol=1e-6, atol=1e-6)
    sides = [(student, logits.grad), (teacher, teacher_logits.grad)] if both else [(student, logits.grad)]
    for block, grad in sides:
        grad = grad * block.head.scale
        if block.head.softcap is not None:
            capped = logits if block is student else teacher_logits
            grad = grad * (1 - (capped.detach() / block.head.softcap) ** 2)
        scale = float(grad.abs().max().clamp_min(1e-3))
        rounding = ROUNDING if dtype == torch.bfloat16 else 0.0
        wide = (1e-4 + 2 * between_rounding) * max(scale, block.head.scale)
        torch.testing.assert_close(block.logits.float(), grad, rtol=rounding, atol=wide)


DUAL_SPACE = [(2, 1), (2, 0), (2, 1), (2, 1)]  # the teacher's space, the student's
SUCCESSOR = [*DUAL_SPACE[:2], (2, 0), *DUAL_SPACE[2:]]  # between them, where the projected teacher agrees
# (reads, writes) of each stream's logits.
PASSES = {
    "sft": [(2, 1)],
    "kd": [(2, 1), (2, 0)],
    "uld": [(3, 1), (1, 0)],
    "mined": [(2, 1), (1, 0), (2, 1)],  # the last is the teacher in the student's vocabulary
    "dskd": DUAL_SPACE,
    "dskd_cma": DUAL_SPACE,
    "dskd_v2": SUCCESSOR,
    "dskd_v2_eta": SUCCESSOR,
}


@pytest.mark.parametrize("kind", METHODS)
def test_how_often_logits_are_read_and_written(kind, monkeypatch):
    """Every load and store of the kernels is counted that goes to the logits of a stream, in bf16."""
    torch.manual_seed(3)
    buffers, counts = [], []
    made = case(kind, (2, 1), (2, 1), (64, 64), dtype=torch.bfloat16)
    method, own, other = made[0], made[3], made[4]
    if kind == "mined":  # all of the teacher's tokens go somewhere, and all tokens are aligned
        method.sources, method.runs, method.targets = (
            torch.arange(64),
            torch.ones(64, dtype=torch.int64),
            torch.arange(64),
        )
    if other.pairs is not None:
        other = other._replace(pairs=torch.arange(3).repeat(2, 1).T)

    def remember(tokens, weight, make=fused.buffer):
        buffers.append(make(tokens, weight))
        counts.append([0, 0])
        return buffers[-1]

    def count(name, way):
        plain = getattr(InterpreterBuilder, name)

        def counted(self, pointers, *arguments):
            mask = arguments[0 if way == 0 else 1].data
            for buffer, found in zip(buffers, counts, strict=True):
                start, size = buffer.data_ptr(), buffer.stride(0) * len(buffer) * buffer.itemsize
                found[way] += int((mask & (pointers.data >= start) & (pointers.data < start + size)).sum())
            return plain(self, pointers, *arguments)

        monkeypatch.setattr(InterpreterBuilder, name, counted)

    monkeypatch.setattr(fused, "buffer", remember)
    count("create_masked_load", 0)
    count("create_masked_store", 1)
    method(own, other, means(method))
    # A label's logit is one more of 64 in a row.
    passes = [tuple(round(x / b.numel()) for x in found) for b, found in zip(buffers, counts, strict=True)]
    assert [each for each in passes if each != (0, 0)] == PASSES[kind]


def test_where_the_kernels_cannot_be_built_the_plain_code_runs_and_says_why(monkeypatch):
    def fail(device):
        raise RuntimeError("Failed to find\nC compiler.")

    weight = torch.zeros(3, 2)
    monkeypatch.setattr(fused, "check", fail)
    kernels.problem.cache_clear()
    assert kernels.problem(weight.device) == "Failed to find C compiler."
    assert kernels.kernels_for(weight) is kernels.load("plain")
    monkeypatch.undo()
    kernels.problem.cache_clear()
    assert kernels.problem(weight.device) is None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "FUSED", ("cpu",))
        assert kernels.kernels_for(weight) is fused
