"""What a method sees of a model and of a micro-batch: plain tensors.

What goes into and comes out of a method are named tuples and no dataclasses: DeepSpeed hooks the tensors that it finds
in a module's inputs and outputs, to gather a sharded head before the backward pass, and it looks into no dataclass.
"""

from collections.abc import Mapping
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
    pairs: Tensor | None = None  # [M, 2] the teacher's only: (token here, token of the student), aligned one to one


class Model(Protocol):
    """Access to a model's weights at the time of the call (under ZeRO-3 they are whole only inside a forward)."""

    hidden_size: int
    vocab_size: int
    """Width of the head, padding included."""

    def head(self) -> Head: ...

    def embed(self, ids: Tensor) -> Tensor:
        """Input embeddings [N, D] of ids [N], detached."""
        ...


@dataclass(frozen=True)
class MethodContext:
    """What a method is given beside its settings."""

    student: Model
    teacher: Model | None
    """None for the methods that learn from none."""
    memory_mb: int
    """Memory for vocabulary-sized temporaries."""
    student_ids: Tensor | None = None
    """[V] for the methods that align two vocabularies: the student's token of each teacher token, -1 for none."""


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


class ScaleParts(Protocol):
    """What to multiply the sum of each part of the loss with: its weight, divided by its tokens in the global batch.

    A collective call where a method counts its own tokens: the ranks add up what they pass. A method calls it once in
    each forward, on every rank, before its first gradient.
    """

    def __call__(self, counts: Mapping[str, int]) -> Mapping[str, float]:
        """`counts`: the tokens of this micro-batch that each part is over."""
        ...
