"""Where a run stands, as state.json in each of its states holds it: written by the core, read by the launcher too."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import cattrs

from dskd.config.errors import UserError, shown
from dskd.rundir.files import read_json
from dskd.rundir.layout import STATE, StateName

FORMAT = 1
"""Of states; one that is not known is refused."""


@dataclass(frozen=True)
class Scores:
    """What an evaluation during training found."""

    loss: float
    """Mean cross-entropy over the dev response tokens."""
    accuracy: float
    """Share of dev response tokens that are the student's most probable token."""
    rougel: float | None = None
    """ROUGE-L of generated answers, times 100."""
    exact_match: float | None = None

    def __str__(self) -> str:
        text = f"dev loss {self.loss:.4f}  accuracy {100 * self.accuracy:.1f} %"
        if self.rougel is not None:
            text += f"  ROUGE-L {self.rougel:.2f}  exact match {self.exact_match:.1f} %"
        return text


@dataclass(frozen=True)
class SavedModel:
    folder: str
    """Name of its folder in the run directory."""
    scores: Scores


@dataclass(frozen=True)
class TrainState:
    step: int = 0
    """Optimizer steps done."""
    pending: bool = False
    """Whether an evaluation follows `step` that is not done."""
    best: tuple[SavedModel, ...] = ()
    """The saved models that are kept, best first."""
    metrics_bytes: int = 0
    """Length of metrics.jsonl."""
    finished: bool = False

    @property
    def name(self) -> StateName:
        return StateName(self.step, not self.pending)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class StateFile:
    """All of state.json."""

    state: TrainState
    world_size: int
    """Ranks that wrote it."""


def read_state(folder: Path) -> StateFile | None:
    """What a state's folder says of itself, None without. Raises `UserError` where that is no state of this format."""
    values = read_json(folder / STATE)
    if values is None:
        return None
    if values.get("format") != FORMAT:
        raise UserError(f"{folder}: state format {shown(values.get('format'))} is not known to this version of dskd")
    try:
        return StateFile(cattrs.structure(values, TrainState), ranks_in(values["world_size"]))
    except (cattrs.BaseValidationError, KeyError, TypeError, ValueError):
        raise UserError(f"{folder / STATE}: is damaged: it does not say where the run stands") from None


def ranks_in(world_size: object) -> int:
    if not isinstance(world_size, int) or not 0 < world_size < 2**20:
        raise ValueError(f"no number of ranks: {world_size!r}")
    return world_size


def best_of(saved: Sequence[SavedModel], best_by: Literal["loss", "rougel"], count: int) -> tuple[SavedModel, ...]:
    """The `count` best models, best first. Among equals the newer one, which comes later, is better."""

    def order(index: int) -> tuple[float, int]:
        scores = saved[index].scores
        value = scores.loss if best_by == "loss" else -(scores.rougel or 0.0)
        return (math.inf if math.isnan(value) else value), -index

    return tuple(saved[index] for index in sorted(range(len(saved)), key=order)[:count])
