"""Saved models: complete under every ZeRO stage, loadable by transformers or PEFT."""

from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from dskd.engine.distributed import Ranks
from dskd.engine.zero import whole_state
from dskd.rundir.files import published
from dskd.rundir.layout import PROJECTORS


def save_model(folder: Path, student: Any, projectors: nn.Module, tokenizer: Any, ranks: Ranks) -> None:
    """Write student, tokenizer and projectors to `folder`: whole or not at all. A collective call."""
    state = whole_state(student, ranks.is_main)
    projector_state = whole_state(projectors, ranks.is_main)
    if ranks.is_main:
        with published(folder) as temporary:
            student.save_pretrained(temporary, state_dict=state)
            tokenizer.save_pretrained(temporary)
            if projector_state:
                save_file(projector_state, temporary / PROJECTORS)
    ranks.barrier()
