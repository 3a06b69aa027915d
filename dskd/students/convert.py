"""`dskd convert`: pickled weights and old tokenizers to safetensors and tokenizer.json. No pickled code runs."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from dskd.config.errors import UserError, shown
from dskd.config.hub import find_model
from dskd.config.run import check_folder, check_object, require_folder
from dskd.models.load import TOKENIZER_FILES, load_tokenizer, loading
from dskd.rundir.files import as_user_error, published, refuse_filled

INDEX, SINGLE = "pytorch_model.bin.index.json", "pytorch_model.bin"
ADAPTER, ADAPTER_CONFIG = "adapter_model.bin", "adapter_config.json"
BY_HAND = (
    "where you trust it, load it in Python with trust_remote_code=True or torch.load(weights_only=False), and call "
    "model.save_pretrained(OUT)"
)


def convert(source: Path, folder: Path) -> None:
    """Write a model, or a LoRA adapter, to `folder` as safetensors with its tokenizer: whole or not at all.

    Raises `UserError` with the way to convert by hand where the files hold more than weights.
    """
    source = find_model(source)
    require_folder("MODEL", source)
    check_folder("OUT", folder)
    refuse_filled(folder)
    with as_user_error(folder, "OUT"), published(folder) as temporary:
        if (source / ADAPTER_CONFIG).is_file():
            convert_adapter(source, temporary)
        else:
            convert_model(source, temporary)
        if any((source / name).is_file() for name in TOKENIZER_FILES):
            load_tokenizer(source, "MODEL").save_pretrained(temporary)
        else:
            print(f"no tokenizer in {source}: none of {', '.join(TOKENIZER_FILES)} is there")
    print(f"{folder}: written, and loads without pickle")


def convert_model(source: Path, folder: Path) -> None:
    check_object("MODEL", source / "config.json")
    check_shards(source)
    safe = any(source.glob("*.safetensors"))
    if not safe and not any((source / name).is_file() for name in (SINGLE, INDEX)):
        raise UserError(f"MODEL: no weights in {source}: {SINGLE}, {INDEX} or *.safetensors is expected")
    options = {"local_files_only": True, "trust_remote_code": False}
    with loading(f"MODEL: {source} does not load without running code of its own; {BY_HAND}; what is wrong"):
        AutoConfig.from_pretrained(source, **options)
        model, report = AutoModelForCausalLM.from_pretrained(
            source, dtype="auto", use_safetensors=safe, weights_only=True, output_loading_info=True, **options
        )
    if missing := sorted(report["missing_keys"]):
        raise UserError(f"MODEL: {source} lacks {len(missing)} weight(s) of its architecture, first {missing[0]}")
    model.save_pretrained(folder)


def check_shards(source: Path) -> None:
    """Raise `UserError` where an index names files outside of the folder."""
    index = source / INDEX
    if not index.is_file():
        return
    check_object("MODEL", index)
    places = json.loads(index.read_bytes()).get("weight_map")
    names = set(places.values()) if isinstance(places, dict) else {None}
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise UserError(f"MODEL: {index} names {shown(name)}, which is no file of its folder")


def convert_adapter(source: Path, folder: Path) -> None:
    check_object("MODEL", source / ADAPTER_CONFIG)
    if not (source / ADAPTER).is_file():
        raise UserError(f"MODEL: no {ADAPTER} in {source}, so there is nothing to convert")
    with loading(f"MODEL: {source / ADAPTER} does not load without running code of its own; {BY_HAND}; what is wrong"):
        weights = torch.load(source / ADAPTER, map_location="cpu", weights_only=True)
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "adapter_model.safetensors")
    shutil.copyfile(source / ADAPTER_CONFIG, folder / ADAPTER_CONFIG)
