"""The teacher as a frozen copy on every rank."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dskd.config.models import TeacherConfig
from dskd.data.batch import Batch
from dskd.losses.tensors import Model
from dskd.models.load import load_causal_lm, merge_adapter
from dskd.models.views import ModelView, check_view, check_vocabulary


class ResidentTeacher:
    """Runs a micro-batch when it is asked for (implements `Teacher`)."""

    def __init__(self, view: ModelView) -> None:
        self.view = view

    @property
    def ends(self) -> Model:
        return self.view.ends

    def states(self, batches: Sequence[Batch]) -> Iterator[Tensor]:
        for batch in batches:
            with torch.no_grad():  # not around the yield: it would hold for whoever asks, too
                states = self.view.body.states(batch.teacher)
            yield states


def load_resident(settings: TeacherConfig, tokenizer: Any, precision: str, device: torch.device) -> ResidentTeacher:
    """The frozen teacher on `device`, its adapter merged in. Raises `UserError` for a model that does not fit."""
    model = load_causal_lm(settings.path, "teacher.path", precision, settings.trust_remote_code)
    if settings.adapter is not None:
        model = merge_adapter(model, settings.adapter, "teacher.adapter")
    view = ModelView(model.to(device).eval().requires_grad_(False), "teacher.path")
    check_vocabulary(view, tokenizer)
    check_view(view)
    return ResidentTeacher(view)
