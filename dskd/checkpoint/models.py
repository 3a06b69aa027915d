"""Saved models: complete under every ZeRO stage, loadable by transformers or PEFT."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any

from peft import peft_model
from torch import Tensor, nn
from transformers import modeling_utils

from dskd.checkpoint.host_memory import HostMemory, to_host
from dskd.checkpoint.tensor_file import TensorFile
from dskd.engine.distributed import Ranks
from dskd.engine.zero import whole_state
from dskd.rundir.files import Contents, as_user_error
from dskd.rundir.layout import PROJECTORS


def model_files(
    student: Any, projectors: nn.Module, tokenizer: Any, memory: HostMemory | None, ranks: Ranks
) -> dict[str, Any]:
    """The files of student, tokenizer and projectors as they are now; on the main rank, and none elsewhere.

    Nothing in them belongs to the models that are trained. A collective call.

    Args:
        memory: what the weights are copied to on the main rank; without it each gets memory of its own.
    """
    copy = to_host
    if memory is not None:
        memory.begin()
        copy = memory.copy
    state = whole_state(student, ranks.is_main, copy)
    projector_state = whole_state(projectors, ranks.is_main, copy)
    files: dict[str, Any] = {}
    ranks.together(lambda: files.update(saved_files(student, state, tokenizer)) if ranks.is_main else None)
    return files | ({PROJECTORS: TensorFile(projector_state)} if projector_state else {})


def saved_files(student: Any, state: dict[str, Tensor], tokenizer: Any) -> Contents:
    """What `save_pretrained` writes for a student with the weights `state`, and for its tokenizer."""
    with as_user_error(Path(gettempdir()), "TMPDIR"), TemporaryDirectory() as name:
        folder = Path(name)
        with tensors_kept(folder) as tensor_files:
            student.save_pretrained(folder, state_dict=state)
        tokenizer.save_pretrained(folder)
        others = [file for file in folder.rglob("*") if file.is_file()]
        return {str(file.relative_to(folder)): [file.read_bytes()] for file in others} | tensor_files


@contextmanager
def tensors_kept(folder: Path) -> Iterator[dict[str, Any]]:
    """Inside, the safetensors files that transformers and PEFT mean to write below `folder` are kept here instead.

    Which tensors a model's file holds, and under which names, they decide while they write it. Where a version of
    theirs writes in another way, its file is there like any other.
    """
    kept: dict[str, Any] = {}

    def keep(tensors: dict[str, Tensor], file: str | Path, metadata: dict[str, str] | None = None) -> None:
        kept[os.path.relpath(file, folder)] = TensorFile(tensors, metadata)

    with ExitStack() as stack:
        for library in (modeling_utils, peft_model):
            if hasattr(library, "safe_save_file"):
                stack.callback(setattr, library, "safe_save_file", library.safe_save_file)
                library.safe_save_file = keep
        yield kept
