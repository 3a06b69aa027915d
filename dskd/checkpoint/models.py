"""Saved models: complete under every ZeRO stage, loadable by transformers or PEFT."""

from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from dskd.engine.distributed import Ranks
from dskd.engine.zero import whole_state
from dskd.rundir.files import as_user_error, persistently, published
from dskd.rundir.layout import PROJECTORS


def save_model(folder: Path, student: Any, projectors: nn.Module, tokenizer: Any, ranks: Ranks) -> None:
    """Write student, tokenizer and projectors to `folder`: whole or not at all. A collective call."""
    state = whole_state(student, ranks.is_main)
    projector_state = whole_state(projectors, ranks.is_main)

    def write() -> None:
        with published(folder) as temporary:
            student.save_pretrained(temporary, state_dict=state)
            tokenizer.save_pretrained(temporary)
            if projector_state:
                save_file(projector_state, temporary / PROJECTORS)

    def write_whole() -> None:
        with as_user_error(folder):
            persistently(write)

    ranks.together(lambda: write_whole() if ranks.is_main else None)
