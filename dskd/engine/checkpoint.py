"""Saved models: complete under every ZeRO stage, loadable by transformers or PEFT, the best ones kept."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import save_file
from torch import nn

from dskd.engine.distributed import Ranks
from dskd.engine.files import published
from dskd.engine.zero import whole_state


@dataclass(frozen=True)
class Scores:
    """What an evaluation found."""

    loss: float
    """Mean cross-entropy over the dev response tokens."""
    accuracy: float
    """Share of dev response tokens that are the student's most probable token."""
    rougel: float | None = None
    """ROUGE-L of generated answers, times 100."""
    exact_match: float | None = None


def model_name(epoch: int, step: int, scores: Scores) -> str:
    rougel = "" if scores.rougel is None else f"_rougel{scores.rougel:.4f}"
    return f"epoch{epoch}_step{step}_loss{scores.loss:.4f}{rougel}"


def save_model(folder: Path, student: Any, projectors: nn.Module, tokenizer: Any, ranks: Ranks) -> None:
    """Write student, tokenizer and projectors to `folder`: whole or not at all. A collective call."""
    state = whole_state(student, ranks.is_main)
    projector_state = whole_state(projectors, ranks.is_main)
    if ranks.is_main:
        with published(folder) as temporary:
            student.save_pretrained(temporary, state_dict=state)
            tokenizer.save_pretrained(temporary)
            if projector_state:
                save_file(projector_state, temporary / "projectors.safetensors")
    ranks.barrier()


@dataclass(frozen=True)
class Saved:
    folder: Path
    scores: Scores


def best_of(saved: Sequence[Saved], best_by: Literal["loss", "rougel"], count: int) -> tuple[Saved, ...]:
    """The `count` best models, best first. Among equals the newer one, which comes later, is better."""

    def order(index: int) -> tuple[float, int]:
        scores = saved[index].scores
        return (scores.loss if best_by == "loss" else -(scores.rougel or 0.0)), -index

    return tuple(saved[index] for index in sorted(range(len(saved)), key=order)[:count])
