"""What differs between the run that a directory holds and the one that is to go on in it."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from dskd.config.load import to_plain
from dskd.config.run import RunConfig
from dskd.config.training import TrainConfig

HARMLESS = (
    "eval.",
    "checkpoint.",
    "launch.",
    "output.",
    "report.",
    "description",
    "data.workers",
    "train.micro_batch_size",
    "train.micro_batch_tokens",
    "train.stall_minutes",
    "train.start_minutes",
    "train.save_minutes",
    # Where a teacher is, not which.
    "teacher.backend",
    "teacher.shard_group",
    "teacher.offload",
    # The engine's settings but for the precision: what is computed where, not what.
    "engine.zero_stage",
    "engine.offload",
    "engine.persistence_threshold",
    "engine.gradient_checkpointing",
    "engine.compile",
    "engine.loss_memory_mb",
)
"""Beginnings of the keys that may change between two starts of a run."""
LENGTH = ("train.epochs", "train.max_steps")
"""May grow."""


def changed(before: RunConfig, after: RunConfig) -> dict[str, str]:
    """Each changed key with both values, "old -> new"; where the output lies does not count."""
    old, new = dict(flat(to_plain(before))), dict(flat(to_plain(after)))
    keys = [key for key in {**old, **new} if not key.startswith("output.")]
    return {key: f"{old.get(key)} -> {new.get(key)}" for key in keys if old.get(key) != new.get(key)}


def harmful(changes: Mapping[str, str]) -> dict[str, str]:
    """Those after which the run would no longer be the same."""
    return {key: change for key, change in changes.items() if not key.startswith(HARMLESS)}


def is_longer(before: TrainConfig, after: TrainConfig) -> bool:
    """Whether a run has at least as many steps as before, by its settings alone."""
    most = [train.max_steps or math.inf for train in (before, after)]
    return after.epochs >= before.epochs and most[1] >= most[0]


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
