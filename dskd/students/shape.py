"""A smaller configuration of a model: which layers stay, and which axes of its weights get shorter.

Nothing here knows a family: an axis belongs to the width, the heads or the MLP where its length follows that setting.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from dskd.config.errors import UserError

Kind = Literal["width", "heads", "key_value_heads", "mlp"]
FIELDS: Mapping[Kind, str] = {
    "width": "hidden_size",
    "heads": "num_attention_heads",
    "key_value_heads": "num_key_value_heads",
    "mlp": "intermediate_size",
}
"""What a configuration calls them."""
Axes = dict[str, dict[int, Kind]]
"""For each weight that gets shorter: the kind of each such axis."""


@dataclass(frozen=True)
class Shape:
    """What a student keeps of its model; None is all of it."""

    layers: int | None = None
    width: int | None = None
    heads: int | None = None
    """Query heads; key and value heads follow in proportion."""
    mlp: int | None = None

    @property
    def narrower(self) -> bool:
        return any(size is not None for size in (self.width, self.heads, self.mlp))


def evenly(layers: int, count: int) -> list[int]:
    """`count` of so many layers, evenly spread, the first and the last among them."""
    if not 2 <= count <= layers:
        raise UserError(f"--layers: 2 to {layers} are allowed, the first and the last always stay; got {count}")
    return [round(i * (layers - 1) / (count - 1)) for i in range(count)]


def layers_of(model: Any) -> tuple[str, nn.ModuleList]:
    """The name and the list of a model's layers. Raises `UserError` for one that is no plain stack of them."""
    config = model.config
    count = config.get_text_config().num_hidden_layers
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if config.get_text_config() is not config or len(lists) != 1:
        raise UserError(
            f"MODEL: {type(model).__name__} is not supported: a text model of one stack of layers is expected"
        )
    return lists[0]


def sizes_of(config: Any, shape: Shape) -> dict[Kind, tuple[int, int]]:
    """What gets shorter: (size of the model, size of the student)."""
    wanted: dict[Kind, int | None] = {"width": shape.width, "heads": shape.heads, "mlp": shape.mlp}
    found: dict[Kind, tuple[int, int]] = {}
    for kind, new in wanted.items():
        if new is None:
            continue
        old = getattr(config, FIELDS[kind], None)
        if not isinstance(old, int):
            raise UserError(f"--{kind}: the model's configuration has no number {FIELDS[kind]} to change")
        if not 1 <= new <= old:
            raise UserError(f"--{kind}: 1 to {old} is allowed, got {new}")
        found[kind] = (old, new)
    shared = getattr(config, FIELDS["key_value_heads"], None)
    if "heads" in found and isinstance(shared, int):
        old, new = found["heads"]
        if new * shared % old:
            raise UserError(f"--heads: {old // shared} heads share a key and a value; a multiple of that is allowed")
        found["key_value_heads"] = (shared, new * shared // old)
    return found


def smaller_config(config: Any, kept: Sequence[int], sizes: Mapping[Kind, int]) -> Any:
    """The student's configuration; what is listed by layer is listed of those that stay."""
    new = copy.deepcopy(config)
    for name, value in config.to_dict().items():
        if "layer" in name and isinstance(value, list) and len(value) == config.num_hidden_layers:
            setattr(new, name, [value[index] for index in kept])
    new.num_hidden_layers = len(kept)
    if sizes:
        try:
            new.head_dim = head_size(config)  # else it would follow from the other two
        except AttributeError:
            raise UserError(
                f"--{next(iter(sizes))}: the model's head size follows from other sizes; it stays as it is"
            ) from None
    for kind, size in sizes.items():
        setattr(new, FIELDS[kind], size)
    return new


def head_size(config: Any) -> int:
    found = getattr(config, "head_dim", None)
    return found if isinstance(found, int) else int(config.hidden_size // config.num_attention_heads)


def axes_of(config: Any, sizes: Mapping[Kind, tuple[int, int]]) -> Axes:
    """The axes whose length follows each size, one size at a time.

    Raises `UserError` where one holds several things in a row (query, key and value fused) and so cannot be cut alike.
    """
    whole, found = weight_shapes(config), Axes()
    for kind, (old, new) in sizes.items():
        if old == new:
            continue
        unit = head_size(config) if kind in ("heads", "key_value_heads") else 1
        shorter = weight_shapes(smaller_config(config, range(config.num_hidden_layers), {kind: new}))
        if shorter.keys() != whole.keys():
            raise UserError(f"--{kind}: the model has other weights with another {FIELDS[kind]}, so it cannot change")
        for name, shape in shorter.items():
            for axis, (before, after) in enumerate(zip(whole[name], shape, strict=True)):
                if before == after:
                    continue
                if (before, after) != (old * unit, new * unit) or axis in found.get(name, {}):
                    raise UserError(
                        f"--{kind}: {name} is {list(whole[name])}, and its axis {axis} is more than {kind}; only "
                        "models that keep query, key, value and the parts of the MLP apart get narrower"
                    )
                found.setdefault(name, {})[axis] = kind
        if not any(kind in by_axis.values() for by_axis in found.values()):
            raise UserError(
                f"--{kind}: no weight of the model gets shorter with {FIELDS[kind]} alone, so it cannot change"
            )
    return found


def weight_shapes(config: Any) -> dict[str, torch.Size]:
    """The shape of each weight of a model, without making any."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {name: tensor.shape for name, tensor in model.state_dict().items()}
