"""The teacher as a frozen copy on every rank."""

import importlib.util
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import BitsAndBytesConfig

from dskd.config.errors import UserError
from dskd.config.models import TeacherConfig
from dskd.data.batch import Batch
from dskd.losses.tensors import Model
from dskd.models.load import load_causal_lm, merge_adapter
from dskd.models.views import ModelView, check_view, check_vocabulary


class ResidentTeacher:
    """Runs a micro-batch when it is asked for, and on a GPU the next one beside the student (implements `Teacher`)."""

    def __init__(self, view: ModelView) -> None:
        self.view, self.device = view, view.ends.embeddings.weight.device
        self.stream = torch.get_device_module(self.device).Stream()
        self.runs_ahead = self.device.type != "cpu"

    @property
    def ends(self) -> Model:
        return self.view.ends

    def states(self, batches: Sequence[Batch]) -> Iterator[Tensor]:
        yield from (self.one_ahead(batches) if self.runs_ahead else map(self.run, batches))

    @torch.no_grad()
    def run(self, batch: Batch) -> Tensor:
        return self.view.body.states(batch.teacher)

    def one_ahead(self, batches: Sequence[Batch]) -> Iterator[Tensor]:
        """On a stream of its own: while the student works on a micro-batch, the states of the next one are made.

        The stream waits for all that the student was given before. So it is never more than one micro-batch ahead, and
        the memory of states that were given back is used again only when the student has read them.
        """
        streams = torch.get_device_module(self.device)
        student = streams.current_stream()
        running: Tensor | None = None
        for batch in [*batches, None]:
            given = running
            student.wait_stream(self.stream)
            self.stream.wait_stream(student)
            if batch is not None:
                with streams.stream(self.stream):
                    running = self.run(batch)
            if given is not None:
                yield given


def load_resident(settings: TeacherConfig, tokenizer: Any, precision: str, device: torch.device) -> ResidentTeacher:
    """The frozen teacher on `device`, its adapter merged in. Raises `UserError` for a model that does not fit."""
    if settings.quantize == "none":
        model = load_causal_lm(settings.path, "teacher.path", precision, settings.trust_remote_code)
        if settings.adapter is not None:
            model = merge_adapter(model, settings.adapter, "teacher.adapter")
        model = model.to(device)
    else:
        model = load_quantized(settings, precision, device)
    view = ModelView(model.eval().requires_grad_(False), "teacher.path")
    check_vocabulary(view, tokenizer)
    check_view(view)
    return ResidentTeacher(view)


def load_quantized(settings: TeacherConfig, precision: str, device: torch.device) -> Any:
    """The teacher with the weights of its layers in int8, each row with a scale (LLM.int8, arXiv 2208.07339)."""
    check_quantize(settings, device)
    return load_causal_lm(
        settings.path,
        "teacher.path",
        precision,
        settings.trust_remote_code,
        device_map={"": device},
        quantization_config=BitsAndBytesConfig(load_in_8bit=True),  # which leaves the head as it is
    )


def check_quantize(settings: TeacherConfig, device: torch.device) -> None:
    """Raise `UserError` where a quantized teacher cannot run."""
    what = f"teacher.quantize: {settings.quantize}"
    if settings.quantize != "none" and device.type != "cuda":
        raise UserError(f"{what} needs a GPU, and none is visible")
    if settings.quantize != "none" and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"{what} needs the package bitsandbytes: pip install bitsandbytes")
