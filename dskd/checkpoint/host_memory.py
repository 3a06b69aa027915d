"""Host memory for copies of states and models, from which they are written while training goes on."""

import weakref
from collections.abc import Iterator
from concurrent import futures
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from mmap import MADV_DONTFORK, MAP_ANONYMOUS, MAP_PRIVATE, mmap
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dskd.checkpoint.shards import state_bytes
from dskd.engine.distributed import Ranks

ALIGNMENT = 64
MOST = 0.5
"""Share of what is free that copies may take: training begins, and will need more itself."""
GB = 1e9
BOOT = Path("/proc/sys/kernel/random/boot_id")
"""The same for all that runs on one node now, and for nothing else."""


class HostMemory:
    """Room for the copies of one state or model: taken once, used again for each; page-locked where a GPU copies."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.size, self.taken = size, 0
        self.memory = mmap(-1, max(size, 1), MAP_PRIVATE | MAP_ANONYMOUS)
        self.memory.madvise(MADV_DONTFORK)  # else processes that make batches would keep all of it as it was
        whole = torch.frombuffer(self.memory, dtype=torch.uint8)
        whole.zero_()  # so that no save has to wait until the system finds the pages
        self.reader: futures.Future[Any] | None = None
        """What has to be done before other copies may come in the place of these."""
        if device.type == "cuda":
            cuda: Any = torch.cuda
            cudart, start = cuda.cudart(), whole.data_ptr()
            # torch's own pinned memory comes in powers of two. Where this is refused, copies take longer.
            if int(cudart.cudaHostRegister(start, len(whole), 0)) == 0:
                weakref.finalize(self, cudart.cudaHostUnregister, start).atexit = False

    def begin(self) -> None:
        """Make room for the next copies, once the last ones have been written."""
        if self.reader is not None:
            futures.wait([self.reader])
        self.taken = 0

    def copy(self, tensor: Tensor) -> Tensor:
        """What a tensor holds now, in one with a storage of its own: libraries take a shared one for tied weights."""
        end = self.taken + room_of(tensor.nbytes)
        if tensor.nbytes == 0 or end > self.size:  # not foreseen: it gets memory of its own
            return to_host(tensor)
        host = torch.frombuffer(self.memory, dtype=tensor.dtype, count=tensor.numel(), offset=self.taken)
        self.taken = end
        return host.view(tensor.shape).copy_(tensor.detach())


def to_host(tensor: Tensor) -> Tensor:
    """A copy on the CPU, whatever device the tensor is on."""
    return tensor.detach().to("cpu", copy=True)


def room_of(size: int) -> int:
    """Bytes that a tensor of `size` bytes takes among others."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def model_bytes(module: Any) -> int:
    """Bytes of all weights and buffers, each once, in full shape."""
    weights = (prod(getattr(p, "ds_shape", p.shape)) * p.element_size() for p in module.parameters())
    return sum(map(room_of, weights)) + sum(room_of(b.nbytes) for b in module.buffers())


@dataclass(frozen=True)
class Copies:
    """Where states and models are copied to; None where there is no room, and training waits until they are written."""

    state: HostMemory | None
    model: HostMemory | None
    """On the main rank."""
    told: str
    """For the log."""


def reserve(engine: Any, ranks: Ranks) -> Copies:
    """Take the memory for copies on all ranks, or on none where a node has not enough. A collective call."""
    state, model = state_bytes(engine, room_of), model_bytes(engine.module) if ranks.is_main else 0
    nodes: dict[str, tuple[int, int]] = {}
    for node, size, free in ranks.gather((boot_id(), state + model, free_memory())):
        before, least = nodes.get(node, (0, free))
        nodes[node] = before + size, min(least, free)
    size, free = max(nodes.values(), key=lambda node: node[0] - MOST * node[1])
    if size > MOST * free:
        told = f"{size / GB:.2f} GB of host memory, and {free / GB:.2f} are free on a node; they use at most half of it"
        return Copies(None, None, f"training stands still while it is saved: copies would take {told}")
    told = f"training goes on while it is saved, from copies in {size / GB:.2f} GB of host memory a node"
    return Copies(HostMemory(state, ranks.device), HostMemory(model, ranks.device) if ranks.is_main else None, told)


def boot_id() -> str:
    with suppress(OSError):
        return BOOT.read_text(encoding="ascii").strip()
    return ""


def free_memory(system: Path = Path("/")) -> int:
    """Bytes that this node has left, or the cgroup that holds this process to a limit; `system` is the folder /."""
    found = list(cgroups_left(system))
    with suppress(OSError):
        for line in (system / "proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                found.append(1024 * int(line.split()[1]))
    return max(0, min(found, default=0))


def cgroups_left(system: Path) -> Iterator[int]:
    """What each cgroup above this process has left of its limit; what files take in its cache counts as free."""
    with suppress(OSError):
        for line in (system / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            root = system / "sys/fs/cgroup"
            names = "memory.max", "memory.current", "file", "shmem"
            if controllers == "memory":  # the first version of cgroups
                root /= controllers
                names = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache", "total_shmem"
            elif controllers:
                continue
            own = root / path.lstrip("/")
            for folder in (own, *own.parents):
                if folder.is_relative_to(root):
                    yield from left_of(folder, *names)


def left_of(folder: Path, limit: str, used: str, cached: str, shared: str) -> Iterator[int]:
    with suppress(OSError, ValueError):  # a cgroup without a limit says "max"
        most = int((folder / limit).read_text(encoding="ascii"))
        taken = int((folder / used).read_text(encoding="ascii"))
        lines = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
        counts = {name: int(count) for name, count in map(str.split, lines)}
        yield most - taken + counts.get(cached, 0) - counts.get(shared, 0)
