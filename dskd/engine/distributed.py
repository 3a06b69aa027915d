"""Ranks: starting the process group, and the few collectives that training needs."""

import logging
import os
import sys
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

if not torch.cuda.is_available():
    # DeepSpeed reads this when it is first imported, and warns where it has to guess.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")


@dataclass(frozen=True)
class Ranks:
    """This process among all."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Element-wise sum over the ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def sum_int(self, value: int) -> int:
        return int(self.sum(torch.tensor(value, device=self.device)))

    def gather(self, value: Any) -> list[Any]:
        """`value` of every rank, in rank order, on every rank. Only what our own ranks send is unpickled."""
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, value)
        return gathered

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()


def visible_gpus() -> int:
    return torch.cuda.device_count()


def start() -> Ranks:
    """Join the process group that RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT name.

    NCCL with GPUs, gloo without.
    """
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank)))
        torch.cuda.set_device(device)
    # DeepSpeed calls two collectives by names that torch means to retire, and would be told so at every step.
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*torch.distributed.*is deprecated")
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if device.type == "cpu":
        # DeepSpeed's own shared-memory collectives take a minute to compile and are optional: gloo does the work.
        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    deepspeed.init_distributed("nccl" if device.type == "cuda" else "gloo", verbose=False)
    return Ranks(rank, world_size, device)


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()
