"""A loss in chunks equals the loss in one piece, and for a plain head what autograd makes of the dense form."""

from dataclasses import dataclass, field

import pytest
import torch
from torch.nn import functional

from dskd.config.methods import DskdCmaConfig, KdConfig, SftConfig
from dskd.losses.dskd_cma import DskdCma
from dskd.losses.kd import Kd
from dskd.losses.sft import Sft
from dskd.losses.streaming import chunks
from dskd.losses.tensors import Head, Tokens

VOCABULARY, TOKENS = 6000, 40  # fp32 logits of all tokens take about 1 MB: with 1 MB, every method needs several chunks
HEADS = {"plain": {}, "scaled": {"scale": 0.5}, "soft-capped": {"softcap": 2.0}, "both": {"scale": 3.0, "softcap": 2.0}}


@dataclass
class Model:
    """A model of which only its embeddings and head exist."""

    hidden_size: int
    shape: dict = field(default_factory=dict)
    bias: bool = False

    def __post_init__(self):
        self.vocab_size = VOCABULARY
        self.embeddings = torch.randn(VOCABULARY, self.hidden_size)
        self.weight = torch.randn(VOCABULARY, self.hidden_size).requires_grad_()
        self.offset = torch.randn(VOCABULARY).requires_grad_() if self.bias else None

    def head(self):
        return Head(self.weight, self.offset, **self.shape)

    def embed(self, ids):
        return self.embeddings[ids]

    def logits(self, hidden):
        """Dense, with autograd."""
        logits = functional.linear(hidden, self.weight, self.offset) * self.shape.get("scale", 1.0)
        cap = self.shape.get("softcap")
        return logits if cap is None else cap * torch.tanh(logits / cap)


def tokens(width):
    ids = torch.randint(VOCABULARY, (2, TOKENS))
    return Tokens(torch.randn(TOKENS, width).requires_grad_(), ids[0], ids[1], (TOKENS - 15, 0, 15))


def run(kind, settings, student, teacher, sides, memory_mb):
    """Loss, parts and all gradients of one method."""
    torch.manual_seed(5)  # the projectors
    method = kind(settings, student, teacher, memory_mb)
    leaves = [sides[0].hidden, student.weight, *([student.offset] if student.bias else [])]
    leaves += method.parameters()
    out = method(*sides, {part: 0.1 * weight for part, weight in method.weights.items()})
    return [out.loss, *out.parts.values()], torch.autograd.grad(out.loss, leaves)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(
    ("kind", "settings"),
    [(Sft, SftConfig()), (Kd, KdConfig()), (DskdCma, DskdCmaConfig())],
    ids=lambda k: str(k)[-20:-2],
)
def test_chunks_change_nothing(kind, settings, head, bias):
    torch.manual_seed(1)
    student, teacher = Model(8, HEADS[head], bias), Model(12)
    sides = tokens(8), tokens(12)
    whole, chunked = (run(kind, settings, student, teacher, sides, memory_mb) for memory_mb in (1000, 1))
    assert len(list(chunks(TOKENS, 1, [2 * VOCABULARY]))) > 1
    torch.testing.assert_close(chunked, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("head", HEADS)
def test_kd_is_what_autograd_makes_of_the_dense_form(head, bias):
    torch.manual_seed(2)
    student, teacher = Model(8, HEADS[head], bias), Model(12)
    sides = tokens(8), tokens(12)
    streamed, gradients = run(Kd, KdConfig(temperature=2.0), student, teacher, sides, 1)
    logits = student.logits(sides[0].hidden)
    ce = functional.cross_entropy(logits, sides[0].labels, reduction="sum")
    targets = teacher.logits(sides[1].hidden).detach().div(2).softmax(-1)
    kd = functional.kl_div((logits / 2).log_softmax(-1), targets, reduction="sum")
    leaves = [sides[0].hidden, student.weight, *([student.offset] if bias else [])]
    dense = torch.autograd.grad(0.05 * ce + 0.05 * kd, leaves)
    torch.testing.assert_close(streamed[1:], [ce.detach(), kd.detach()], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients, dense, rtol=1e-3, atol=1e-5)
