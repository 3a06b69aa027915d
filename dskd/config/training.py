"""Settings of optimization, evaluation, generation and checkpoints."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dskd.config.errors import LAST_SEED, MOST, require, require_at_most


@dataclass(frozen=True)
class TrainConfig:
    epochs: int = 10
    """Passes over the training records; what does not fill a global batch is left out of an epoch."""
    max_steps: int | None = None
    """Stop after this many optimizer steps, whatever the epochs say."""
    global_batch_size: int = 32
    """Records of one optimizer step over all ranks; gradient accumulation follows from it."""
    micro_batch_size: int = 4
    """Records that one rank holds at a time."""
    micro_batch_tokens: int | None = None
    """Instead of micro_batch_size: tokens of each side, padding included, that one rank holds at most at a time."""
    lr: float = 5.0e-4
    """Peak learning rate of the student."""
    projector_lr: float = 1.0e-3
    """Peak learning rate of the method's projectors."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rates go down to 0 over the run."""
    warmup_ratio: float = 0.0
    """Share of the steps over which the learning rates rise from 0."""
    weight_decay: float = 1.0e-2
    """AdamW's weight decay, on matrices only."""
    clip: float = 1.0
    """Largest norm of the gradient; 0 turns clipping off."""
    seed: int = 10
    """Seed of the data order, dropout and the projectors."""
    stall_minutes: float = 20.0
    """End the run, to be started again, when nothing has moved on a rank for so long."""
    start_minutes: float = 60.0
    """The same before the first step, while models are read and ranks find each other."""
    save_minutes: float = 60.0
    """The same while a state or a model is saved."""

    def __post_init__(self) -> None:
        for key in ("epochs", "global_batch_size", "micro_batch_size", "lr", "projector_lr"):
            require(getattr(self, key) > 0, key, f"must be above 0, got {getattr(self, key)}")
        for key in ("stall_minutes", "start_minutes", "save_minutes"):
            require(getattr(self, key) > 0, key, f"must be above 0, got {getattr(self, key)}")
        require(self.max_steps is None or self.max_steps > 0, "max_steps", f"must be above 0, got {self.max_steps}")
        require_at_most(
            self, MOST, "epochs", "max_steps", "global_batch_size", "micro_batch_size", "micro_batch_tokens"
        )
        require_at_most(self, 1.0, "lr", "projector_lr")
        require(0 <= self.seed <= LAST_SEED, "seed", f"must be from 0 to {LAST_SEED}, got {self.seed}")
        require(0 <= self.warmup_ratio < 1, "warmup_ratio", f"must be in [0, 1), got {self.warmup_ratio}")
        for key in ("weight_decay", "clip"):
            require(getattr(self, key) >= 0, key, f"must not be negative, got {getattr(self, key)}")


Engine = Literal["dskd", "vllm"]
"""What can generate answers."""


@dataclass(frozen=True)
class GenerationConfig:
    greedy: bool = False
    """Take the most probable token instead of sampling."""
    temperature: float = 1.0
    """Divides the logits before sampling."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens with this probability."""
    max_length: int = 512
    """Tokens of prompt and answer together."""
    max_prompt_length: int = 256
    """Tokens of the prompt; longer prompts lose their beginning."""
    batch_size: int = 16
    """Prompts of max_length, answer included, that one rank holds at a time; of shorter ones as many as are as long."""

    def __post_init__(self) -> None:
        require(self.temperature > 0, "temperature", f"must be above 0, got {self.temperature}")
        require(0 < self.top_p <= 1, "top_p", f"must be in (0, 1], got {self.top_p}")
        require(self.batch_size > 0, "batch_size", f"must be above 0, got {self.batch_size}")
        require_at_most(self, MOST, "max_length", "batch_size")
        require(
            0 < self.max_prompt_length < self.max_length,
            "max_prompt_length",
            f"must be above 0 and below max_length ({self.max_length}), got {self.max_prompt_length}",
        )


@dataclass(frozen=True)
class EvalConfig:
    every_epochs: int = 1
    """Evaluate on data.dev, and save a model, after every so many epochs; the end of the run always counts."""
    generate: bool = False
    """Generate answers as well and score them by ROUGE-L and exact match."""
    generation: GenerationConfig = GenerationConfig()
    """How answers are generated."""

    def __post_init__(self) -> None:
        require(self.every_epochs > 0, "every_epochs", f"must be above 0, got {self.every_epochs}")
        require_at_most(self, MOST, "every_epochs")


@dataclass(frozen=True)
class CheckpointConfig:
    """Models to keep, and the state that a run goes on from."""

    keep_best: int = 1
    """Saved models to keep; worse ones are deleted after a better one is complete."""
    best_by: Literal["loss", "rougel"] = "loss"
    """What makes a model better: lower dev loss, or higher dev ROUGE-L (needs eval.generate)."""
    every_steps: int | None = None
    """Save the state, from which a run goes on, after every so many steps, or as soon as the last one is written; the
    end of an epoch always counts."""
    every_minutes: float | None = 30.0
    """Save the state when so much time has passed since the last one; empty leaves it to every_steps."""
    keep_last: int = 1
    """States to keep; older ones are deleted after a newer one is complete."""
    scratch_dir: Path | None = None
    """Folder on a disk of each node's own: states and models are written there first, and then copied."""

    def __post_init__(self) -> None:
        for key in ("keep_best", "every_steps", "every_minutes", "keep_last"):
            value = getattr(self, key)
            require(value is None or value > 0, key, f"must be above 0, got {value}")
        require_at_most(self, MOST, "keep_best", "every_steps", "every_minutes", "keep_last")
