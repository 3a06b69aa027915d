"""Settings of DeepSpeed and of memory."""

from dataclasses import dataclass
from typing import Literal

from dskd.config.errors import MOST, require, require_at_most


@dataclass(frozen=True)
class EngineConfig:
    zero_stage: Literal[0, 1, 2, 3] = 0
    """What DeepSpeed shards over the ranks: 0 nothing, 1 optimizer state, 2 and gradients, 3 and weights."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """What is kept in CPU memory: optimizer state (stages 1 to 3), or weights as well (stage 3)."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Precision of weights and activations; with bf16 the optimizer keeps fp32 weights."""
    persistence_threshold: int = 100_000
    """Under ZeRO-3, weights of at most so many values stay whole on every rank."""
    gradient_checkpointing: bool = False
    """Recompute the student's activations in the backward pass instead of keeping them."""
    compile: Literal["auto", "off"] = "auto"
    """Compile the decoder layers of student and teacher: on a GPU, where that works. The first step takes longer."""
    loss_memory_mb: int = 384
    """Memory for vocabulary-sized temporaries of the loss on each rank; it decides how many tokens run at a time, and
    whether the gradient of the student's head is summed over them in fp32: where that fits into as much again."""

    def __post_init__(self) -> None:
        require(
            self.offload == "none" or self.zero_stage > 0,
            "offload",
            f"{self.offload} needs zero_stage 1, 2 or 3, got 0",
        )
        require(self.offload != "all" or self.zero_stage == 3, "offload", "all needs zero_stage 3")
        require(self.loss_memory_mb > 0, "loss_memory_mb", f"must be above 0, got {self.loss_memory_mb}")
        least = self.persistence_threshold
        require(least >= 0, "persistence_threshold", f"must not be negative, got {least}")
        require_at_most(self, MOST, "loss_memory_mb", "persistence_threshold")
