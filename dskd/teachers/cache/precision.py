"""How hidden states are stored: as they are, or in a byte a value with one scale a token."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Precision = Literal["exact", "fp8", "int8"]
STORED = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
LARGEST = {"fp8": 448.0, "int8": 127.0}


class Stored(NamedTuple):
    """What is kept of N hidden states."""

    rows: Tensor  # [N, D]
    scales: Tensor | None = None  # [N] fp32, what a row is to be multiplied with

    def split(self, lengths: Sequence[int]) -> "list[Stored]":
        """One for each record of a batch, in the host's memory."""
        rows = torch.split(self.rows.cpu(), list(lengths))
        if self.scales is None:
            return [Stored(own) for own in rows]
        return [Stored(*own) for own in zip(rows, torch.split(self.scales.cpu(), list(lengths)), strict=True)]


def encode(states: Tensor, precision: Precision) -> Stored:
    """Hidden states [N, D] as they are stored, on the same device."""
    if precision == "exact":
        return Stored(states)
    largest = states.abs().amax(-1).float()
    scales = largest.clamp_min(torch.finfo(torch.float32).tiny) / LARGEST[precision]
    values = states.float() / scales.unsqueeze(-1)
    return Stored((values.round() if precision == "int8" else values).to(STORED[precision]), scales)


def decode(stored: Stored, dtype: torch.dtype) -> Tensor:
    """Hidden states [N, D] from what is stored."""
    if stored.scales is None:
        return stored.rows
    return (stored.rows.float() * stored.scales.unsqueeze(-1)).to(dtype)


def stored_dtype(precision: Precision, dtype: torch.dtype) -> torch.dtype:
    """What rows of states of `dtype` are stored in."""
    return STORED.get(precision, dtype)
