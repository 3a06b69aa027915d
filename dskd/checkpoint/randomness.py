"""The state of every random generator that training may draw from."""

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def seed(number: int) -> None:
    """Begin all generators anew."""
    random.seed(number)
    np.random.seed(number % 2**32)
    torch.manual_seed(number)  # CUDA's as well


def capture(device: torch.device) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Python's, numpy's, torch's and CUDA's state: tensors, and values that JSON holds."""
    tensors = {"rng:torch": torch.get_rng_state()}
    if device.type == "cuda":
        tensors["rng:cuda"] = torch.cuda.get_rng_state(device)
    kind, keys, *rest = np.random.get_state()
    values = {
        "rng:python": random.getstate(),
        "rng:numpy": [kind, np.asarray(keys).tolist(), *rest],
    }
    return tensors, values


def restore(tensors: Mapping[str, Tensor], values: Mapping[str, Any], device: torch.device) -> None:
    """The inverse of `capture`."""
    torch.set_rng_state(tensors["rng:torch"])
    if device.type == "cuda" and "rng:cuda" in tensors:
        torch.cuda.set_rng_state(tensors["rng:cuda"], device)
    version, internal, gauss = values["rng:python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = values["rng:numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
