"""A smaller model out of the weights of a larger one: layers that stay, and of their axes what is used most."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from dskd.students.shape import Axes, Kind, axes_of, head_size, layers_of, smaller_config

Kept = Mapping[tuple[Kind, int | None], Tensor]
"""Indices that stay of an axis, by its kind and layer; width is the same in all layers, its layer None."""


def smaller_model(
    model: Any, layers: Sequence[int], sizes: Mapping[Kind, tuple[int, int]], rows: Sequence[Tensor]
) -> tuple[Any, Tensor | None]:
    """A model of these layers and sizes, and which of the hidden dimensions it has; None: all.

    Args:
        sizes: (old, new) of what gets shorter.
        rows: token ids [1, S] to choose by what is used, where anything gets shorter.
    """
    path, _ = layers_of(model)
    number = re.compile(rf"{re.escape(path)}\.(\d+)\.")
    axes = axes_of(model.config, sizes)
    kept = most_used(model, axes, sizes, rows, number) if sizes else {}
    config = smaller_config(model.config, layers, {kind: new for kind, (_, new) in sizes.items()})
    small = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    weights = model.state_dict()
    state = {}
    for name in small.state_dict():
        layer = None if (found := number.search(name)) is None else layers[int(found[1])]
        source = name if layer is None else number.sub(f"{path}.{layer}.", name)
        tensor = weights[source]
        for axis, kind in axes.get(source, {}).items():
            tensor = tensor.index_select(axis, kept[kind, None if kind == "width" else layer])
        state[name] = tensor.clone()
    small.load_state_dict(state)
    return small.eval(), kept.get(("width", None))


def most_used(
    model: Any, axes: Axes, sizes: Mapping[Kind, tuple[int, int]], rows: Sequence[Tensor], number: re.Pattern[str]
) -> Kept:
    """What stays: the largest mean absolute inputs of the linear modules that read an axis.

    Width is chosen once for all layers, each module weighing alike; heads and MLP in each layer for itself. Heads that
    share a key and a value stay or go together.
    """
    readers: dict[str, Kind] = {
        name: axes[f"{name}.weight"][1]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and 1 in axes.get(f"{name}.weight", {})
    }
    scores: dict[tuple[Kind, int | None], Tensor] = {}
    for name, score in mean_inputs(model, readers, rows).items():
        found, kind = number.search(name + "."), readers[name]
        key = kind, None if kind == "width" or found is None else int(found[1])
        scores[key] = scores.get(key, 0) + score / score.mean()
    kept: dict[tuple[Kind, int | None], Tensor] = {}
    for (kind, layer), score in scores.items():
        if kind != "heads":
            kept[kind, layer] = largest(score, sizes[kind][1])
            continue
        groups, new_groups = sizes.get("key_value_heads", sizes["heads"])
        chosen = largest(score.reshape(groups, -1).sum(1), new_groups)
        kept[kind, layer] = places(chosen, len(score) // groups)
        kept["key_value_heads", layer] = places(chosen, head_size(model.config))
    return kept


def largest(scores: Tensor, count: int) -> Tensor:
    """The indices of the largest, in increasing order."""
    return scores.topk(count).indices.sort().values


def places(blocks: Tensor, size: int) -> Tensor:
    """Blocks of `size` -> the indices in them."""
    return (blocks[:, None] * size + torch.arange(size, device=blocks.device)).flatten()


@torch.no_grad()
def mean_inputs(model: Any, names: Iterable[str], rows: Sequence[Tensor]) -> dict[str, Tensor]:
    """The mean absolute input of each of these modules, over all tokens."""
    sums: dict[str, Tensor] = {}

    def adding(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            sums[name] = sums.get(name, 0) + inputs[0].float().abs().flatten(0, -2).sum(0)

        return add

    with ExitStack() as hooks:
        for name in names:
            hooks.enter_context(model.get_submodule(name).register_forward_pre_hook(adding(name)))
        for row in rows:
            model(row, use_cache=False)
    tokens = sum(row.numel() for row in rows)
    return {name: total / tokens for name, total in sums.items()}
