"""Ranks: starting the process group, and the few collectives that training needs."""

import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dskd.config.errors import UserError
from dskd.engine import rendezvous
from dskd.engine.preemption import Decision, Flags, Stopped

LONGEST_MINUTES = 60.0
"""Of what the others may have to wait for where nothing else is said, such as one that saves."""

if not torch.cuda.is_available():
    # DeepSpeed reads this when it is first imported, and warns where it has to guess.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")


@dataclass(frozen=True)
class Ranks:
    """This process among all."""

    rank: int
    world_size: int
    device: torch.device
    flags: Flags = field(default_factory=Flags)
    timeout: timedelta = timedelta(minutes=2 * LONGEST_MINUTES)
    """Of collectives."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Element-wise sum over the ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(values)
        self.flags.moved()
        return values

    def agree(self, save: bool = False) -> Decision:
        """What all ranks do: stop, where any got a signal, and what any asks for here. A collective call."""
        wanted = torch.tensor([self.flags.stop_requested, save], dtype=torch.float32, device=self.device)
        return Decision(*(count > 0 for count in self.sum(wanted).tolist()))

    def stop_if_asked(self) -> None:
        """Raise `Stopped` on all ranks where any was asked to stop. A collective call."""
        if self.agree().stop:
            raise Stopped

    def sum_int(self, value: int) -> int:
        return self.sum_ints([value])[0]

    def sum_ints(self, values: Sequence[int]) -> list[int]:
        """Element-wise sum over the ranks; one alone does not wait for its GPU."""
        if self.world_size == 1:
            self.flags.moved()
            return list(values)
        found: list[int] = self.sum(torch.tensor(values, dtype=torch.int64, device=self.device)).tolist()
        return found

    def gather(self, value: Any) -> list[Any]:
        """`value` of every rank, in rank order, on every rank, as JSON brings it back. A collective call.

        JSON and no pickle: what a peer sends can be wrong, but it cannot run.
        """
        own = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(self.device)
        sizes = torch.zeros(self.world_size, dtype=torch.int64, device=self.device)
        sizes[self.rank] = len(own)
        counts = self.sum(sizes).tolist()
        padded = torch.zeros(max(counts), dtype=torch.uint8, device=self.device)
        padded[: len(own)] = own
        parts = [torch.empty_like(padded) for _ in counts]
        if self.world_size > 1:
            dist.all_gather(parts, padded)
        else:
            parts = [padded]
        self.flags.moved()
        return [json.loads(part[:count].cpu().numpy().tobytes()) for part, count in zip(parts, counts, strict=True)]

    def together(self, do: Callable[[], Any]) -> list[Any]:
        """What `do` returns on each rank, as JSON. Where it raises `UserError` on any, all raise it. Collective."""
        result, problem = None, None
        try:
            result = do()
        except UserError as error:
            problem = str(error)
        found = self.gather((result, problem))
        for _, text in found:
            if text is not None:
                raise UserError(text)
        return [value for value, _ in found]

    def nodes(self) -> list[range]:
        """The ranks of each node. A collective call. Raises `UserError` where they are not neighbours."""
        places = self.gather(int(os.environ.get("LOCAL_RANK", self.rank)))
        starts = [rank for rank, place in enumerate(places) if place == 0]
        nodes = [range(*ends) for ends in pairwise([*starts, len(places)])]
        if [place for node in nodes for place in range(len(node))] != places:
            raise UserError(f"LOCAL_RANK: the ranks of a node must follow each other, got {places} for ranks 0, 1, ...")
        return nodes

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()


def visible_gpus() -> int:
    return torch.cuda.device_count()


def start(flags: Flags | None = None, minutes: float = LONGEST_MINUTES) -> Ranks:
    """Join the process group that RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT and DSKD_SECRET name.

    NCCL with GPUs, gloo without. Collectives wait for twice as long as a rank may be busy, `minutes`: the watchdog,
    which knows what it is busy with, comes first.
    """
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cpu")
    if torch.cuda.is_available():
        place = int(os.environ.get("LOCAL_RANK", rank))
        if place >= visible_gpus():
            raise UserError(f"launch.processes: {place + 1} are more than the {visible_gpus()} GPUs of this machine")
        device = torch.device("cuda", place)
        torch.cuda.set_device(device)
    # DeepSpeed calls two collectives by names that torch means to retire, and would be told so at every step.
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*torch.distributed.*is deprecated")
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # Whatever the optimizer, DeepSpeed imports its Muon, and to compile that one takes five seconds of each start.
    sys.modules["deepspeed.runtime.compiler"].compile = lambda: lambda function: function  # type: ignore[attr-defined]
    if device.type == "cpu":
        # DeepSpeed's own shared-memory collectives take a minute to compile and are optional: gloo does the work.
        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    rendezvous.stay_on_loopback()
    store = rendezvous.make_store(rank, world_size)
    backend = "nccl" if device.type == "cuda" else "gloo"
    ranks = Ranks(rank, world_size, device, flags or Flags(), timedelta(minutes=2 * minutes))
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=ranks.timeout)
    rendezvous.prove(rank, world_size, store, device)
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False)
    return ranks


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()
