"""The state of every random generator that training may draw from."""

import json
import random
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor


def capture(device: torch.device) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Python's, numpy's, torch's and CUDA's state, as tensors and as texts."""
    tensors = {"rng:torch": torch.get_rng_state()}
    if device.type == "cuda":
        tensors["rng:cuda"] = torch.cuda.get_rng_state(device)
    kind, keys, *rest = np.random.get_state()
    texts = {
        "rng:python": json.dumps(random.getstate()),
        "rng:numpy": json.dumps([kind, np.asarray(keys).tolist(), *rest]),
    }
    return tensors, texts


def restore(tensors: Mapping[str, Tensor], texts: Mapping[str, str], device: torch.device) -> None:
    """The inverse of `capture`."""
    torch.set_rng_state(tensors["rng:torch"])
    if device.type == "cuda" and "rng:cuda" in tensors:
        torch.cuda.set_rng_state(tensors["rng:cuda"], device)
    version, internal, gauss = json.loads(texts["rng:python"])
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = json.loads(texts["rng:numpy"])
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
