"""What storing hidden states in a byte a value does to the loss, measured on some of them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dskd.losses.cross_entropy import cross_entropy
from dskd.losses.divergence import forward_kl
from dskd.losses.streaming import StreamedLogits
from dskd.losses.tensors import Head
from dskd.teachers.cache.precision import Stored, decode

TOKENS, CHUNK = 2048, 128


@dataclass
class LossError:
    """Sums over response tokens, of what the teacher's head makes of exact and of stored states."""

    tokens: int = 0
    exact: float = 0.0
    stored: float = 0.0
    """Cross-entropy with the labels."""
    divergence: float = 0.0
    """KL of the stored from the exact distribution."""

    @property
    def is_known(self) -> bool:
        return self.tokens >= TOKENS

    @torch.no_grad()
    def add(self, head: Head, states: Tensor, stored: Stored, labels: Tensor) -> None:
        """`states` [N, D], and what is `stored` of them."""
        sides = StreamedLogits(states, head), StreamedLogits(decode(stored, states.dtype), head)
        for start in range(0, len(labels), CHUNK):
            rows = slice(start, start + CHUNK)
            exact, rounded = (side.logits(rows) for side in sides)
            self.divergence += float(forward_kl(rounded, exact)[0].sum())
            self.exact += float(cross_entropy(exact, labels[rows])[0].sum())
            self.stored += float(cross_entropy(rounded, labels[rows])[0].sum())
        self.tokens += len(labels)

    def __str__(self) -> str:
        exact, stored, divergence = (each / self.tokens for each in (self.exact, self.stored, self.divergence))
        relative = abs(stored - exact) / exact
        return (
            f"the teacher's cross-entropy on {self.tokens:,} tokens becomes {stored:.5f} from {exact:.5f} "
            f"({relative:.1e} relative), KL {divergence:.1e}"
        )
