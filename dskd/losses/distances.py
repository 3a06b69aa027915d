"""The distances that a method can ask for: what they are, as data, and how torch computes them.

Called with undivided logits of the student [n, V], and those of the teacher [n, W] or, where a token has no teacher's,
its label [n], each returns the distance of each token [n] and its gradient, which may be narrower than V. On a GPU
`kernels` computes the same from the data alone.
"""

from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from dskd.config.methods import DistillationConfig, Divergence
from dskd.losses import sorting
from dskd.losses.cross_entropy import cross_entropy
from dskd.losses.divergence import (
    adaptive_kl,
    forward_kl,
    js_divergence,
    log_of_mixture,
    reverse_kl,
    skewed_forward_kl,
    skewed_reverse_kl,
    through_softmax,
)


class Distance(Protocol):
    def __call__(self, logits: Tensor, target: Tensor, /) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class Tempered:
    """A divergence at temperatures, over the columns that both sides have where one head is padded wider."""

    divergence: Divergence
    temperature: float
    teacher_temperature: float = 1.0
    skew: float = 0.1
    alpha: float = 0.5

    @property
    def teacher_divisor(self) -> float:
        return self.temperature * self.teacher_temperature

    def __call__(self, logits: Tensor, target: Tensor, /) -> tuple[Tensor, Tensor]:
        width = min(logits.shape[-1], target.shape[-1])
        student, teacher = logits[:, :width] / self.temperature, target[:, :width] / self.teacher_divisor
        value, grad = self.inner()(student, teacher)
        return value, grad.div_(self.temperature)

    def inner(self) -> Distance:
        """The divergence of logits that are divided already."""
        named: dict[str, Distance] = {
            "forward_kl": forward_kl,
            "reverse_kl": reverse_kl,
            "js_divergence": js_divergence,
            "skewed_forward_kl": partial(skewed_forward_kl, skew=self.skew),
            "skewed_reverse_kl": partial(skewed_reverse_kl, skew=self.skew),
            "adaptive_kl": partial(adaptive_kl, alpha=self.alpha),
        }
        return named[self.divergence]


def distance(settings: DistillationConfig) -> Tempered:
    """The distance a run asks for."""
    return Tempered(
        settings.divergence,
        settings.temperature,
        settings.teacher_temperature,
        settings.skew,
        settings.adaptive_alpha,
    )


@dataclass(frozen=True, eq=False)
class Carried:
    """A divergence from the teacher's distribution carried into the student's vocabulary.

    Each target has the probability of all its sources. The distance is over the targets alone; what the teacher gives
    to tokens that are no source is left out.
    """

    divergence: Tempered
    targets: Tensor  # [C] tokens of the student
    sources: Tensor  # [S] tokens of the teacher, those of one target side by side
    runs: Tensor  # [C] how many there are for each target

    @cached_property
    def groups(self) -> list["Group"]:
        """Targets by the power of two that their runs of sources fit into, the columns [C_g] of each."""
        starts = self.runs.cumsum(0) - self.runs
        power = torch.ceil(torch.log2(self.runs))
        found = []
        for each in sorted(set(power.tolist())):
            here = power == each
            runs = self.runs[here]
            found.append(Group(self.targets[here], starts[here], runs, int(runs.max())))
        return found

    def __call__(self, logits: Tensor, target: Tensor, /) -> tuple[Tensor, Tensor]:
        probs = target.div(self.divergence.teacher_divisor).softmax(-1)
        summed = torch.segment_reduce(probs[:, self.sources].T.contiguous(), "sum", lengths=self.runs, axis=0).T
        # The distance divides by the temperatures once more.
        teacher = log_of_mixture(summed).mul_(self.divergence.teacher_divisor)
        value, grad = self.divergence(logits[:, self.targets], teacher)
        return value, torch.zeros_like(logits).index_copy_(-1, self.targets, grad)


class Group(NamedTuple):
    """Targets with runs of about one length."""

    targets: Tensor  # [C_g]
    starts: Tensor  # [C_g] where their sources begin
    runs: Tensor  # [C_g] how many
    longest: int


@dataclass(frozen=True)
class ToLabel:
    """Cross-entropy at a temperature: the forward KL from a teacher that is sure of the label."""

    temperature: float

    def __call__(self, logits: Tensor, target: Tensor, /) -> tuple[Tensor, Tensor]:
        value, grad = cross_entropy(logits / self.temperature, target)
        return value, grad.div_(self.temperature)


@dataclass(frozen=True)
class Sorted:
    """Sum of |p - q| over both sides' probabilities in the order of their size; the shorter list ends in zeros."""

    def __call__(self, logits: Tensor, target: Tensor, /) -> tuple[Tensor, Tensor]:
        probs, teacher_probs = logits.softmax(-1), target.softmax(-1)
        width, teacher_width = probs.shape[-1], teacher_probs.shape[-1]
        shared = min(width, teacher_width)
        ordered, order = sorting.sort_with_order(probs)
        largest, rest = sorting.largest_sorted(teacher_probs, shared)
        gap = ordered[:, width - shared :] - largest
        # Where the other side has run out of tokens, the gap is the probability itself.
        value = gap.abs().sum(-1) + rest + ordered[:, : width - shared].sum(-1)
        slope = torch.ones_like(probs)
        slope.scatter_(-1, order[:, width - shared :], gap.sign_())
        return value, through_softmax(probs, slope)
