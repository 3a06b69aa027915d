"""A streamed loss equals the obvious one: value and every gradient, for any shape, head, type and chunk size."""

from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cases import HEADS, WIDE, D, assert_streamed_is_dense, case
from support.heads import means
from torch.utils._python_dispatch import TorchDispatchMode

from dskd.config.methods import Divergence
from dskd.losses import METHODS, dskd_cma, streaming
from dskd.losses.kernels import plain
from dskd.losses.streaming import StreamedLogits, chunk_size
from dskd.losses.tensors import Head

DIVERGENCES = get_args(Divergence)


@pytest.mark.parametrize("kind", METHODS)
@settings(max_examples=60)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=3),
    vocabularies=st.tuples(st.integers(2, 40), st.integers(2, 40)),
    head=st.sampled_from(list(HEADS.values())),
    bias=st.booleans(),
    chunk=st.integers(1, 7),
    block=st.integers(1, 100),
    group=st.integers(1, 20),
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
    group,
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
        patch.setattr(plain, "CHUNK_TOKENS", chunk)
        patch.setattr(plain, "BLOCK_CELLS", {"cpu": block})
        patch.setattr(dskd_cma, "GROUP_BYTES", 2**20 // (group * (D + WIDE)))
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
    row_bytes = 4 * 50257
    assert chunk_size(10_000, 90, row_bytes, most=512) == 90 * 2**20 // row_bytes
    assert chunk_size(10_000, 10**6, row_bytes, most=512) == 512
    assert chunk_size(3, 10**6, row_bytes, most=512) == 3
    assert chunk_size(10_000, 1, 4 * 10**9, most=512) == 1


@pytest.mark.parametrize(("alike", "rounded"), [(0.0, 7.0), (1.0, 13 / 3 + 0.5)])
def test_a_large_head_s_gradient_is_rounded_once_a_chunk(alike, rounded):
    """Thirteen chunks, as of 8,192 tokens of kd with Qwen's vocabulary; beside one rounding of an exact sum."""
    torch.manual_seed(7)
    tokens, chunk, vocabulary, width = 1024, 79, 512, 64
    grad = (torch.randn(tokens, vocabulary) + alike).bfloat16()
    hidden = (torch.randn(tokens, width) + alike).bfloat16()
    exact = grad.double().T @ hidden.double()
    head = Head(torch.zeros(vocabulary, width, dtype=torch.bfloat16, requires_grad=True))
    error = {}
    for memory_mb in (1, 0):  # what an fp32 sum fits into, and what it does not
        streamed = StreamedLogits(hidden, head, head_memory_mb=memory_mb)
        for start in range(0, tokens, chunk):
            rows = slice(start, min(start + chunk, tokens))
            streamed.backward(rows, grad[rows])
        ((_, found),) = streamed.gradients()
        assert found.dtype == torch.bfloat16
        error[memory_mb] = float((found.double() - exact).norm() / exact.norm())
    once = float((exact.bfloat16().double() - exact).norm() / exact.norm())
    assert once < 2**-9
    assert error[1] < 2 * once  # on a CPU each chunk's product is rounded too
    assert 0.8 < error[0] / (rounded**0.5 * once) < 1.5


def test_label_smoothing_is_torch_s():
    torch.manual_seed(6)
    method, student, _, own, _ = case("sft", (7,), (7,), (30, 30), label_smoothing=0.3)
    value = method(own, None, means(method)).loss
    expected = torch.nn.functional.cross_entropy(student.logits(own.hidden), own.labels, label_smoothing=0.3)
    torch.testing.assert_close(value, expected)


class Waits(TorchDispatchMode):
    """Remembers operations whose result's size or value a GPU's host has to wait for."""

    OPERATIONS = ("nonzero", "_local_scalar_dense", "masked_select", "_unique2", "bincount")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name in self.OPERATIONS or by_mask:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", METHODS)
def test_the_host_waits_once_where_a_method_counts_itself_and_else_never(kind, monkeypatch):
    method, _, _, own, other = case(kind, (3, 2), (3, 2), (20, 30))
    with Waits() as waits:
        # On a CPU a list is made without an operation.
        read = torch.Tensor.tolist
        monkeypatch.setattr(torch.Tensor, "tolist", lambda self: waits.found.append("tolist") or read(self))
        method.start_step()
        method(own, other, means(method)).loss.backward()
    # How many tokens have a part, and in how many of them both sides agree: two numbers that come together.
    assert waits.found == ["tolist"] * method.counts_itself
