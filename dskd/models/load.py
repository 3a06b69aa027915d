"""Tokenizers and models from Hugging Face folders: safetensors only, no remote code unless asked for."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as hf_logging

from dskd.config.errors import UserError, one_line, shown
from dskd.config.models import LoraConfig, StudentConfig
from dskd.config.run import RunConfig
from dskd.data.tokenization import Limits, check_tokenizer
from dskd.engine.watchdog import why_lost
from dskd.rundir.layout import PROJECTORS

hf_logging.disable_progress_bar()
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
DTYPES: dict[str, Any] = {"bf16": torch.bfloat16, "fp32": torch.float32, "auto": "auto"}
"""By precision; "auto" is as it was saved."""
MOST_TOKENS = 2**24
LARGEST = {"num_hidden_layers": 1024, "num_attention_heads": 2**16, "hidden_size": 2**20, "vocab_size": MOST_TOKENS}
"""Numbers of a configuration above which no model exists: building one would take minutes before it fails."""


WARNED: set[str] = set()


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Inside, whatever a library raises about someone's file is a `UserError` of one line: `what`, and why.

    They raise almost anything, and what is in Rust even its own panic, which is no `Exception`.
    """
    try:
        with warnings_held_back():
            yield
    except UserError:
        raise
    except BaseException as error:
        panic = type(error).__name__ == "PanicException"
        if not (isinstance(error, Exception) or panic) or why_lost(error) is not None:
            raise
        raise UserError(f"{what}: {reason(error)}") from None


@contextmanager
def warnings_held_back() -> Iterator[None]:
    """What transformers and Python warn of inside is told afterwards; where an error tells the same, not at all."""
    log = logging.getLogger("transformers")
    handlers, log.handlers = log.handlers, [held := MemoryHandler(10**6, logging.CRITICAL + 1)]
    try:
        with warnings.catch_warnings(record=True) as warned:
            yield
    finally:
        log.handlers = handlers
    for record in held.buffer:
        log.handle(record)
    for each in warned:
        if str(each.message) not in WARNED:
            WARNED.add(str(each.message))
            warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)


def reason(error: BaseException) -> str:
    """What an error says, in one line, with its kind where that says more."""
    said = one_line(" ".join(str(error).split()), 280)
    if said and isinstance(error, (OSError, ValueError, RuntimeError)):
        return said
    return f"{type(error).__name__}: {said}".removesuffix(": ")


def load_tokenizer(folder: Path, key: str, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model folder. Raises `UserError` naming `key` where there is none that loads."""
    # Without any of these, transformers makes up a tokenizer for some families from their special tokens alone.
    if not trust_remote_code and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(f"{key}: no tokenizer loads from {folder}: none of {', '.join(TOKENIZER_FILES)} is there")
    with loading(f"{key}: no tokenizer loads from {folder}"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
        check_ids(tokenizer)
        return tokenizer


def load_tokenizers(run: RunConfig, limits: Limits) -> tuple[Any, Any]:
    """The tokenizers of the student's side and of the teacher's: one and the same where the vocabularies are equal.

    Raises `UserError` for one that does not load, or lacks a special token.
    """
    student = load_tokenizer(run.student.path, "student.path", run.student.trust_remote_code)
    check_tokenizer(student, limits, "student.path")
    if run.teacher is None or run.method.teacher == "none":
        return student, student
    teacher = load_tokenizer(run.teacher.path, "teacher.path", run.teacher.trust_remote_code)
    check_tokenizer(teacher, limits, "teacher.path")
    return student, student if teacher.get_vocab() == student.get_vocab() else teacher


def check_ids(tokenizer: Any) -> None:
    """Raise for a tokenizer that loads, and does not work."""
    ids = list(tokenizer.get_vocab().values())
    if not ids or not 0 <= min(ids) <= max(ids) < MOST_TOKENS:
        raise ValueError(f"ids from 0 to below {MOST_TOKENS} are expected for its tokens")
    tokenizer.decode(tokenizer.encode("A word.", add_special_tokens=False, split_special_tokens=True))
    for role in ("eos_token_id", "bos_token_id"):
        found = getattr(tokenizer, role)
        if found is not None and not (isinstance(found, int) and 0 <= found <= max(ids)):
            raise ValueError(f"its {role} is {shown(found)}, which is no token")


def load_causal_lm(folder: Path, key: str, precision: str, trust_remote_code: bool, **how: Any) -> Any:
    """A decoder with all its weights. Raises `UserError` where the folder does not hold them.

    Args:
        how: what else transformers is told.
    """
    options = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    with loading(f"{key}: no causal language model loads from {folder}"):
        check_numbers(AutoConfig.from_pretrained(folder, **options), folder)
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, dtype=DTYPES[precision], use_safetensors=True, output_loading_info=True, **options, **how
        )
        missing = sorted(report["missing_keys"])
        if missing:
            raise UserError(f"{key}: {folder} lacks {len(missing)} weight(s) of its architecture, first {missing[0]}")
    model.config.use_cache = False
    return model


def check_numbers(config: Any, folder: Path) -> None:
    """Raise for a configuration of a model that cannot be, or that is far larger than the weights in its folder.

    transformers makes the weights that are missing before it tells, whatever memory that takes.
    """
    text = config.get_text_config()
    numbers = {name: getattr(text, name, 1) for name in LARGEST}
    for name, value in numbers.items():
        if not isinstance(value, int) or not 1 <= value <= LARGEST[name]:
            allowed = f"a whole number from 1 to {LARGEST[name]}"
            raise ValueError(f"{name} in config.json: {allowed} is expected, got {shown(value)}")
    width, layers = numbers["hidden_size"], numbers["num_hidden_layers"]
    least = (numbers["vocab_size"] * width + layers * width * width // 4) // 2  # bytes, at four bits a weight
    there = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    if there < least:
        raise ValueError(f"config.json describes at least {least} bytes of weights, and {there} are there")


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
    with loading("student.lora.targets"):
        adapted: nn.Module = get_peft_model(model, config)
    return adapted


def merge_adapter(model: Any, adapter: Path, key: str) -> Any:
    with with_adapter(model, adapter, key) as adapted:
        return adapted.merge_and_unload()


@contextmanager
def with_adapter(model: Any, adapter: Path, key: str, **options: bool) -> Iterator[Any]:
    """`model` with a LoRA adapter, all of whose weights are there. Raises `UserError` for one that does not fit."""
    if not (adapter / "adapter_model.safetensors").is_file():
        raise UserError(
            f"{key}: no adapter_model.safetensors in {adapter} (pickled .bin files are not read; see dskd convert)"
        )
    with loading(f"{key}: the adapter in {adapter} does not fit the model"):
        adapted = PeftModel.from_pretrained(model, str(adapter), local_files_only=True, **options)
        with safe_open(adapter / "adapter_model.safetensors", "pt") as saved:
            # Else PEFT would look on the hub for the base model whose name its config holds.
            wanted = get_peft_model_state_dict(adapted, save_embedding_layers=False)
            missing = sorted(set(wanted) - set(saved.keys()))
        if missing:
            raise ValueError(f"it lacks {len(missing)} of its weights, first {missing[0]}")
        yield adapted


def load_projectors(method: nn.Module, folder: Path) -> None:
    """Give a method the projectors of a saved model. Raises `UserError` where they do not fit."""
    file = folder / PROJECTORS
    if not file.is_file():
        raise UserError(f"method.projectors_from: no {PROJECTORS} in {folder}")
    with loading(f"method.projectors_from: {file} does not fit"):
        saved = load_file(file)
        for name, tensor in saved.items():
            if not tensor.is_floating_point():
                raise ValueError(f"{name} is {tensor.dtype}; weights are expected")
        method.load_state_dict(saved)


def load_checkpoint(folder: Path, precision: str, device: torch.device) -> Any:
    """A saved student for evaluation: a whole model, or a LoRA adapter merged into the base model it names."""
    if (folder / "adapter_config.json").is_file():
        with loading(f"{folder}: adapter_config.json is not read"):
            base = Path(PeftLoraConfig.from_pretrained(str(folder)).base_model_name_or_path)
            if not base.is_dir():
                raise UserError(f"{folder}: the adapter's base model is not at {base}")
        model = merge_adapter(load_causal_lm(base, str(folder), precision, False), folder, str(folder))
    else:
        model = load_causal_lm(folder, str(folder), precision, False)
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise UserError(f"{folder}: its weights are not finite, first {name}; a model that can answer is expected")
    return model.to(device).eval()
