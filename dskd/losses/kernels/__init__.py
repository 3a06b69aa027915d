"""Losses over a block of logits, by device: one table of who computes them.

`plain` is torch code over fp32 logits in blocks that stay in a processor's cache. `fused` is Triton code over logits in
the type of the product: one pass reads both sides' logits for everything that is wanted of them, a second writes the
gradient over them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor

from dskd.config.errors import one_line
from dskd.losses.distances import Distance
from dskd.losses.tensors import Head

FUSED = ("cuda",)  # types of devices; wherever Triton does not work, all is plain


class Block(NamedTuple):
    """Logits of some tokens through one head, on their way to a loss."""

    logits: Tensor  # [n, V] as `Kernels.shape` left them; the gradient of the product is written over them
    head: Head
    trained: bool  # whether a gradient is wanted


@dataclass(frozen=True)
class Terms:
    """What is wanted of a block of the student's logits, and of the teacher's beside it."""

    labels: Tensor  # [n]
    cross_entropy: bool = True  # False: only whether the labels are predicted
    smoothing: float = 0.0
    distance: Distance | None = None
    predictions: bool = False  # what the teacher's side predicts, the first of equals
    teacher_labels: Tensor | None = None  # [n], for the cross-entropy of the teacher's side


class Scales(NamedTuple):
    """What the gradient of each term is multiplied with."""

    ce: float = 0.0
    distance: float = 1.0
    learn: Tensor | None = None  # [n], weighs the distance of each token too
    teacher_ce: float = 0.0


@dataclass(frozen=True)
class Found:
    """What `measure` found, [n] each, where it was asked for; [0] elsewhere."""

    correct: Tensor
    ce: Tensor
    distance: Tensor
    predictions: Tensor
    teacher_ce: Tensor
    write: Callable[[Scales], None]
    """Writes the gradient of all terms over the logits of both sides; called once, and last."""


class Kernels(Protocol):
    def chunk_tokens(self) -> int:
        """Tokens from which on a matrix product gains nothing from more."""

    def block_tokens(self, device: torch.device, width: int) -> int:
        """Tokens of a block, for logits of this width."""

    def buffer(self, tokens: int, weight: Tensor) -> Tensor:
        """Room for logits [tokens, V] through a head [V, D]."""

    def shape(self, logits: Tensor, head: Head) -> None:
        """Make what comes between product and logits, in place, where it is made before `measure`."""

    def predictions(self, block: Block) -> Tensor:
        """The largest logit's column, the first of equals, [n]."""

    def measure(self, student: Block, teacher: Block | None, terms: Terms) -> Found: ...


def kernels_for(weight: Tensor, *distances: Distance | None) -> Kernels:
    """Who computes losses of logits through this head, [V, D], with these distances."""
    fused = load("fused") if weight.device.type in FUSED and problem(weight.device) is None else None
    if fused is not None and all(fused.computes(each, weight.dtype) for each in distances):  # type: ignore[attr-defined]
        return fused
    return load("plain")


@cache
def problem(device: torch.device) -> str | None:
    """What keeps Triton's kernels from being built and run on this device, in one line; None: nothing."""
    if find_spec("triton") is None:
        return "the package triton is missing"
    try:
        load("fused").check(device)  # type: ignore[attr-defined]
    except Exception as error:  # its compilers raise what they like, first of all where there is no C compiler
        return one_line(" ".join(str(error).split()) or type(error).__name__, 200)
    return None


@cache
def load(name: str) -> Kernels:
    """Triton is imported only where it is used."""
    return cast(Kernels, import_module(f"{__name__}.{name}"))
