"""A model without its weights, and its weights straight from the safetensors files, some rows of a tensor at a time."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter

from dskd.config.errors import UserError, shown
from dskd.models.load import DTYPES, check_numbers, loading, with_adapter

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class LowRank:
    """What a LoRA adapter adds to a weight: scale * (up @ down), transposed where the weight is [in, out]."""

    up: Tensor  # [out, r]
    down: Tensor  # [r, in]
    scale: float
    transposed: bool

    def rows(self, rows: slice) -> Tensor:
        """Rows of the update, fp32."""
        left, right = (self.down.T, self.up.T) if self.transposed else (self.up, self.down)
        return (left[rows].float() @ right.float()) * self.scale


@dataclass(frozen=True)
class Pieces:
    """Where a model's weights are, and what its adapter adds to them."""

    places: Mapping[str, Path]
    """The file of each tensor."""
    names: Mapping[str, Sequence[str]]
    """The tensors that hold each weight; several where a tied one was saved twice."""
    updates: Mapping[str, LowRank]

    def rows(self, name: str, rows: slice, dtype: torch.dtype) -> Tensor:
        """Rows of a weight, its adapter's update merged in, on the CPU; nothing of the file stays mapped."""
        first, *others = (self.read(tensor, rows) for tensor in self.names[name])
        if not all(torch.equal(first, other) for other in others):
            raise ValueError(f"{' and '.join(self.names[name])} are one weight of the model, and differ")
        piece = first.to(dtype)
        if name in self.updates:
            piece = (piece.float() + self.updates[name].rows(rows)).to(dtype)
        return piece

    def read(self, tensor: str, rows: slice) -> Tensor:
        # The file is closed after each, since the pages that were read count as this process's while it is mapped.
        with safe_open(self.places[tensor], "pt") as file:
            read: Tensor = file.get_slice(tensor)[rows].clone()
        return read


def find_pieces(
    model: Any, names: Mapping[str, Sequence[str]], folder: Path, key: str, updates: Mapping[str, LowRank]
) -> Pieces:
    """The weights of an empty `model` in the files of `folder`.

    Args:
        names: of `weight_names`, before anything was done to the model.

    Raises:
        UserError: where a weight is not one tensor of the same name and shape, so that no piece of it can be read.
    """
    found = {}
    with loading(f"{key}: no weights load from {folder}"):
        places = tensor_places(folder)
        shapes = tensor_shapes(set(places.values()))
    for name, aliases in names.items():
        # A body that was saved alone lacks the prefix that its weights have in the model.
        wanted = [one for alias in aliases for one in (alias, alias.removeprefix(f"{model.base_model_prefix}."))]
        found[name] = [tensor for tensor in dict.fromkeys(wanted) if tensor in places]
        shape = list(model.get_parameter_or_buffer(name).shape)
        if not found[name] or any(shapes.get(tensor) != shape for tensor in found[name]):
            raise UserError(
                f"teacher.backend: sharded does not support {key} {folder}: its weight {name} is no tensor of that "
                f"name and shape {shape} in the files; teacher.backend=resident loads whatever transformers does"
            )
    return Pieces(places, found, updates)


def tensor_shapes(files: Iterable[Path]) -> dict[str, list[int]]:
    shapes: dict[str, list[int]] = {}
    for path in files:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            shapes |= {tensor: file.get_slice(tensor).get_shape() for tensor in names}
    return shapes


def weight_names(model: nn.Module) -> dict[str, list[str]]:
    """The name of each weight and saved buffer, and all names of it where modules share it."""
    names: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
    return {same[0]: same for same in names.values()}


def tensor_places(folder: Path) -> dict[str, Path]:
    """The file of each tensor, as transformers looks for it: one file, or several with an index."""
    if (folder / SINGLE).is_file():
        with safe_open(folder / SINGLE, "pt") as file:
            return dict.fromkeys(file.keys(), folder / SINGLE)
    places = json.loads((folder / INDEX).read_bytes())["weight_map"]
    for file in set(places.values()):
        if Path(file).name != file:
            raise ValueError(f"{INDEX} names {shown(file)}, which is no file of this folder")
    return {tensor: folder / file for tensor, file in places.items()}


def empty_causal_lm(folder: Path, key: str, precision: str, trust_remote_code: bool) -> Any:
    """A decoder whose weights are on the meta device. Its buffers are real, as its own constructors compute them."""
    options = {"trust_remote_code": trust_remote_code}
    with loading(f"{key}: no causal language model loads from {folder}"):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, **options)
        check_numbers(config, folder)
        if getattr(config, "quantization_config", None) is not None:
            raise UserError(f"teacher.backend: sharded reads no quantized weights, and those in {folder} are")
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[precision], **options)
        model.tie_weights()  # what was tied above came apart when it was moved
        if any(isinstance(change, WeightConverter) for change in get_model_conversion_mapping(model)):
            raise UserError(
                f"teacher.backend: sharded does not support {type(model).__name__}, whose weights transformers puts "
                "together from others while it loads them; teacher.backend=resident does"
            )
    model.config.use_cache = False
    return model.eval().requires_grad_(False)


def adapter_updates(model: Any, adapter: Path, key: str) -> dict[str, LowRank]:
    """What a LoRA adapter adds to the weights of an empty `model`, by the weight's name; `model` stays as it is.

    Raises:
        UserError: for an adapter that is anything but low-rank updates of linear layers.
    """
    names, updates = weight_names(model), {}
    with with_adapter(model, adapter, key, low_cpu_mem_usage=True) as adapted:
        (active,) = adapted.active_adapters
        plain = adapted.peft_config[active].bias == "none"
        saved = load_file(adapter / "adapter_model.safetensors")  # beside an empty model PEFT's own are empty
        for place, module in adapted.get_base_model().named_modules():
            if isinstance(module, LoraLinear) and not module.lora_variant and not module.lora_bias[active]:
                up, down = (saved[f"base_model.model.{place}.lora_{part}.weight"] for part in "BA")
                updates[f"{place}.weight"] = LowRank(up, down, module.scaling[active], module.fan_in_fan_out)
            elif isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
                plain = False
        adapted.unload()
    if not plain or not updates.keys() <= names.keys():
        raise UserError(
            f"{key}: teacher.backend=sharded merges low-rank updates of linear layers and nothing else, and {adapter} "
            "holds something else; teacher.backend=resident merges whatever PEFT does"
        )
    return updates
