"""The teacher's head and embeddings, beside its states: what the losses need of its weights."""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dskd.losses.tensors import Head
from dskd.models.views import ModelEnds
from dskd.rundir.files import UMASK, persistently, written
from dskd.teachers.cache.pieces import DamagedPiece, index_checksum

CPU = torch.device("cpu")


class CachedEnds:
    """Head on the device, embeddings where they were read (implements `dskd.losses.tensors.Model`)."""

    def __init__(self, head: Head, embeddings: Tensor) -> None:
        self._head, self.embeddings = head, embeddings
        self.vocab_size, self.hidden_size = head.weight.shape

    def head(self) -> Head:
        return self._head

    def embed(self, ids: Tensor) -> Tensor:
        return self.embeddings[ids.to(self.embeddings.device)].to(ids.device)


@torch.no_grad()
def tensors_of(ends: ModelEnds) -> dict[str, Tensor]:
    """What is kept of head and embeddings, in the host's memory; embeddings that are the head's weight are kept once.

    A collective call where the teacher is split over the ranks.
    """
    head = ends.head()
    rows = torch.arange(ends.embeddings.num_embeddings, device=head.weight.device)
    embeddings = ends.embed(rows)  # by the module, which may scale them
    tensors = {"head.weight": head.weight.detach().cpu()}
    if head.bias is not None:
        tensors["head.bias"] = head.bias.detach().cpu()
    if not torch.equal(embeddings, head.weight):
        tensors["embeddings"] = embeddings.cpu()
    return tensors


def write_ends(file: Path, tensors: dict[str, Tensor], ends: ModelEnds) -> None:
    """Publish the tensors of `ends`, and how its logits are scaled."""
    settings = {"scale": json.dumps(ends.scale), "softcap": json.dumps(ends.softcap)}
    about = settings | {"checksum": str(index_checksum(tensors))}

    def write() -> None:
        with written(file) as temporary:
            save_file(tensors, temporary, about)
            temporary.chmod(0o666 & ~UMASK)

    persistently(write)


def read_ends(file: Path, device: torch.device = CPU) -> CachedEnds:
    """Raises `DamagedPiece` where the file is not what was written, OSError where it is not there."""
    try:
        with safe_open(file, "pt") as data:
            tensors = {name: data.get_tensor(name) for name in data.keys()}  # noqa: SIM118
            about = data.metadata() or {}
        if about.get("checksum") != str(index_checksum(tensors)):
            raise ValueError("it has another checksum")
        weight, bias = tensors["head.weight"].to(device), tensors.get("head.bias")
        head = Head(
            weight,
            None if bias is None else bias.to(device),
            json.loads(about["scale"]),
            json.loads(about["softcap"]),
        )
        return CachedEnds(head, tensors.get("embeddings", weight))
    except OSError:
        raise
    except Exception as error:  # safetensors' own error, and what a file that it takes may still lack
        raise DamagedPiece(file, str(error)) from None
