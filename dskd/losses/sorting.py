"""Sorting of probabilities: on a CPU with numpy's vector instructions, elsewhere as torch does it."""

import numpy as np
import torch
from torch import Tensor


def sort_with_order(probs: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities [n, V] in increasing order, and the column of each.

    On a CPU one sort of 64-bit keys does both: positive floats are ordered like their bits, so the column fits below
    them, and numpy sorts such keys, taken for doubles, with vector instructions.
    """
    if probs.device.type != "cpu":
        return probs.sort(-1)
    keys = probs.numpy().view(np.uint32).astype(np.uint64)
    keys <<= np.uint64(32)
    keys |= np.arange(probs.shape[-1], dtype=np.uint64)
    keys.view(np.float64).sort(axis=-1)
    order = (keys & np.uint64(2**32 - 1)).view(np.int64)
    keys >>= np.uint64(32)
    return torch.from_numpy(keys.astype(np.uint32).view(np.float32)), torch.from_numpy(order)


def largest_sorted(probs: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest probabilities of each row in increasing order, and the sum of the others."""
    others = probs.shape[-1] - count
    if probs.device.type != "cpu":
        ordered = probs.sort(-1).values
        return ordered[:, others:], ordered[:, :others].sum(-1)
    values = probs.numpy()
    if others:
        values.partition(others, axis=-1)
    values[:, others:].sort(axis=-1)
    return probs[:, others:], probs[:, :others].sum(-1)
