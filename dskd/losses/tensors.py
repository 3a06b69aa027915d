"""What a method sees of a model and of a micro-batch: plain tensors.

What goes into and comes out of a method are named tuples and no dataclasses: DeepSpeed hooks the tensors that it finds
in a module's inputs and outputs, to gather a sharded head before the backward pass, and it looks into no dataclass.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor


@dataclass(frozen=True)
class Head:
    """The output layer: logits = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap); None: no cap."""

    weight: Tensor  # [V, D]
    bias: Tensor | None = None  # [V]
    scale: float = 1.0
    softcap: float | None = None


class Tokens(NamedTuple):
    """The response tokens of a micro-batch, flat over its samples. N tokens, D the model's hidden size."""

    hidden: Tensor  # [N, D], the last hidden state that predicts each token
    inputs: Tensor  # [N], the token at that place
    labels: Tensor  # [N], the token to predict
    lengths: tuple[int, ...]  # tokens of each sample; their sum is N
    pairs: Tensor | None = None  # [M, 2] the teacher's only: (token here, token of the student) that are aligned


class Model(Protocol):
    """Access to a model's weights at the time of the call (under ZeRO-3 they are whole only inside a forward)."""

    hidden_size: int
    vocab_size: int
    """Width of the head, padding included."""

    def head(self) -> Head: ...

    def embed(self, ids: Tensor) -> Tensor:
        """Input embeddings [N, D] of ids [N], detached."""
        ...


class Sum(NamedTuple):
    """A sum over tokens and how many tokens it is over; the mean is taken once, over the global batch."""

    value: Tensor  # scalar, detached
    tokens: int


class LossOutput(NamedTuple):
    loss: Tensor
    """Scalar to call backward on: the scaled sum of the parts."""
    parts: dict[str, Sum]
    """Unscaled sum of each part."""
    metrics: dict[str, Sum]
    """Anything else worth logging, such as token accuracy."""


Scale = Callable[[Mapping[str, int]], Mapping[str, float]]
"""Tokens of this micro-batch that each part is over -> what to multiply the part's sum with: its weight, divided by its
tokens in the global batch. A method calls it once, before the first gradient."""
