"""The teacher's head and embeddings, beside its states: what the losses need of its weights."""

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
    tensors = {"head.weight": head.weight.detach().cpu(), "scale": torch.tensor(head.scale, dtype=torch.float64)}
    if head.bias is not None:
        tensors["head.bias"] = head.bias.detach().cpu()
    if head.softcap is not None:
        tensors["softcap"] = torch.tensor(head.softcap, dtype=torch.float64)
    if not torch.equal(embeddings, head.weight):
        tensors["embeddings"] = embeddings.cpu()
    return tensors


def write_ends(file: Path, tensors: dict[str, Tensor]) -> None:
    """Publish what `tensors_of` gave."""

    def write() -> None:
        with written(file) as temporary:
            save_file(tensors, temporary, {"checksum": str(index_checksum(tensors))})
            temporary.chmod(0o666 & ~UMASK)

    persistently(write)


def read_ends(file: Path, dtype: torch.dtype, device: torch.device = CPU) -> CachedEnds:
    """The ends of a teacher in `dtype`, whose head goes to `device`.

    Raises `DamagedPiece` where the file is not what was written, OSError where it is not there.
    """
    try:
        with safe_open(file, "pt") as data:
            tensors = {name: data.get_tensor(name) for name in data.keys()}  # noqa: SIM118
            about = data.metadata() or {}
        if about.get("checksum") != str(index_checksum(tensors)):
            raise ValueError("it has another checksum")
        weight, bias = tensors["head.weight"], tensors.get("head.bias")
        embeddings = tensors.get("embeddings", weight)
        (vocabulary, width), (_, other) = weight.shape, embeddings.shape
        kinds = {tensor.dtype for tensor in (weight, bias, embeddings) if tensor is not None}
        if kinds != {dtype} or other != width or not (bias is None or bias.shape == (vocabulary,)):
            raise ValueError(f"a head and embeddings of one width in {dtype} are expected")
        softcap = float(tensors["softcap"]) if "softcap" in tensors else None
        moved = weight.to(device)
        head = Head(moved, None if bias is None else bias.to(device), float(tensors["scale"]), softcap)
        return CachedEnds(head, moved if embeddings is weight else embeddings)
    except OSError:
        raise
    except Exception as error:  # safetensors' own error, and what a file that it takes may still lack
        raise DamagedPiece(file, str(error)) from None
