"""Models of which only embeddings and head exist, for tests of losses."""

from dataclasses import dataclass, field

import torch
from torch.nn import functional

from dskd.losses.tensors import Head


@dataclass
class Weights:
    """Embeddings and weight [V, D]; `shape` holds the head's scale and softcap."""

    embeddings: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None = None
    shape: dict = field(default_factory=dict)

    @classmethod
    def random(cls, vocabulary, width, bias=False, dtype=torch.float32, **shape):
        weight = torch.randn(vocabulary, width).to(dtype).requires_grad_()
        offset = torch.randn(vocabulary).to(dtype).requires_grad_() if bias else None
        return cls(torch.randn(vocabulary, width).to(dtype), weight, offset, shape)

    @property
    def hidden_size(self):
        return self.weight.shape[1]

    @property
    def vocab_size(self):
        return self.weight.shape[0]

    def head(self):
        return Head(self.weight, self.bias, **self.shape)

    def embed(self, ids):
        return self.embeddings[ids]

    def logits(self, hidden):
        """Dense, with autograd."""
        logits = functional.linear(hidden, self.weight, self.bias).float() * self.shape.get("scale", 1.0)
        cap = self.shape.get("softcap")
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def trained(self):
        return [self.weight, *([] if self.bias is None else [self.bias])]


def sums(method):
    """A scale that divides nothing: each part counts as its weight times its sum."""
    return lambda counts: method.weights


def means(method):
    """A scale that divides each part by this micro-batch's own tokens."""
    return lambda counts: {part: weight / max(counts[part], 1) for part, weight in method.weights.items()}
