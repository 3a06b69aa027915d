"""Tokenizers and models from Hugging Face folders: safetensors only, no remote code unless asked for."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as hf_logging

from dskd.config.errors import UserError
from dskd.config.models import LoraConfig, StudentConfig
from dskd.rundir.layout import PROJECTORS

hf_logging.disable_progress_bar()
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def load_tokenizer(folder: Path, key: str, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model folder. Raises `UserError` naming `key` where there is none that loads."""
    # Without any of these, transformers makes up a tokenizer for some families from their special tokens alone.
    if not trust_remote_code and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(f"{key}: no tokenizer loads from {folder}: none of {', '.join(TOKENIZER_FILES)} is there")
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(f"{key}: no tokenizer loads from {folder}: {first_line(error)}") from None


def load_causal_lm(folder: Path, key: str, precision: str, trust_remote_code: bool) -> Any:
    """A decoder with all its weights. Raises `UserError` where the folder does not hold them."""
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=DTYPES[precision],
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{key}: no causal language model loads from {folder}: {first_line(error)}") from None
    missing = sorted(report["missing_keys"])
    if missing:
        raise UserError(f"{key}: {folder} lacks {len(missing)} weight(s) of its architecture, first {missing[0]}")
    model.config.use_cache = False
    return model


def load_student(settings: StudentConfig, precision: str, gradient_checkpointing: bool) -> nn.Module:
    """The model to train; with LoRA only the adapter's weights require gradients."""
    model = load_causal_lm(settings.path, "student.path", precision, settings.trust_remote_code)
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model if settings.lora is None else add_lora(model, settings.lora)


def add_lora(model: Any, settings: LoraConfig) -> nn.Module:
    targets: Any = list(settings.targets) or None
    if settings.targets == ("all-linear",):
        targets = "all-linear"
    modules = [f".{name}" for name, _ in model.named_modules()]
    for target in targets if isinstance(targets, list) else ():
        if not any(name.endswith(f".{target}") for name in modules):
            raise UserError(f"student.lora.targets: no module of the student ends in {target!r}")
    config = PeftLoraConfig(
        task_type="CAUSAL_LM",
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=targets,
    )
    try:
        adapted: nn.Module = get_peft_model(model, config)
    except ValueError as error:
        raise UserError(f"student.lora.targets: {first_line(error)}") from None
    return adapted


def merge_adapter(model: Any, adapter: Path, key: str) -> Any:
    if not (adapter / "adapter_model.safetensors").is_file():
        raise UserError(f"{key}: no adapter_model.safetensors in {adapter} (pickled .bin files are not read)")
    try:
        adapted = PeftModel.from_pretrained(model, str(adapter), local_files_only=True)
        with safe_open(adapter / "adapter_model.safetensors", "pt") as saved:
            missing = sorted(set(get_peft_model_state_dict(adapted)) - set(saved.keys()))
        if missing:
            raise ValueError(f"it lacks {len(missing)} of its weights, first {missing[0]}")
        return adapted.merge_and_unload()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"{key}: the adapter in {adapter} does not fit the model: {first_line(error)}") from None


def load_projectors(method: nn.Module, folder: Path) -> None:
    """Give a method the projectors of a saved model. Raises `UserError` where they do not fit."""
    file = folder / PROJECTORS
    if not file.is_file():
        raise UserError(f"method.projectors_from: no {PROJECTORS} in {folder}")
    try:
        method.load_state_dict(load_file(file))
    except (RuntimeError, SafetensorError) as error:
        raise UserError(f"method.projectors_from: {file} does not fit: {' '.join(str(error).split())}") from None


def load_checkpoint(folder: Path, precision: str, device: torch.device) -> Any:
    """A saved student for evaluation: a whole model, or a LoRA adapter merged into the base model it names."""
    if (folder / "adapter_config.json").is_file():
        base = Path(PeftLoraConfig.from_pretrained(str(folder)).base_model_name_or_path)
        if not base.is_dir():
            raise UserError(f"{folder}: the adapter's base model is not at {base}")
        model = merge_adapter(load_causal_lm(base, str(folder), precision, False), folder, str(folder))
    else:
        model = load_causal_lm(folder, str(folder), precision, False)
    return model.to(device).eval()


def first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]
