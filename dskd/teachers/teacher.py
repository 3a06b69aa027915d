"""What a method learns from, wherever it comes from: hidden states of response tokens, and a model's ends."""

from collections.abc import Iterator, Sequence
from typing import Protocol

from torch import Tensor

from dskd.data.batch import Batch
from dskd.losses.tensors import Model


class Teacher(Protocol):
    """Hidden states times the head is the exact distribution, at a fraction of the bytes of logits."""

    @property
    def ends(self) -> Model:
        """Head and embeddings."""
        ...

    def states(self, batches: Sequence[Batch]) -> Iterator[Tensor]:
        """Last hidden states [N, D] of the response tokens of each micro-batch, on the device of the batches.

        Called once a step, with all micro-batches of this rank; each is asked for just before it is needed.
        """
        ...
