"""Folders of models to break, and an adapter."""

import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model

from dskd.models.load import load_causal_lm


@pytest.fixture
def copy(tiny, tmp_path):
    """A copy of a tiny model's folder, to break."""

    def copy_folder(family: str = "llama") -> Path:
        return Path(shutil.copytree(tiny(family), tmp_path / family))

    return copy_folder


@pytest.fixture(scope="module")
def adapter(tiny, tmp_path_factory) -> Path:
    """A trained LoRA adapter of the tiny llama: its B is not zero."""
    torch.manual_seed(1)
    base = load_causal_lm(tiny("llama"), "teacher.path", "fp32", False)
    folder = tmp_path_factory.mktemp("adapter")
    get_peft_model(base, PeftLoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False)).save_pretrained(folder)
    return folder
