"""The layers that stay take over what those between them did, as far as a linear map can.

Most layers end in a linear module whose output is added to the hidden states. Its weights are refitted by least squares
so that the student's hidden states come as near as they can to the model's own where the next layer that stays begins:
layer after layer, each on what those before it give. No gradient, no step.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dskd.students.shape import layers_of

RIDGE = 0.3
"""Of the mean square of the inputs: new weights stay near the old ones, or they learn the records by heart."""


@torch.no_grad()
def refit(
    model: Any, student: Any, layers: Sequence[int], columns: Tensor | None, rows: Sequence[Tensor]
) -> list[float] | None:
    """Refit `student`, which has these layers of `model`.

    Args:
        columns: the hidden dimensions that stay; None: all.
        rows: token ids [1, S] each.

    Returns:
        For each layer what is left of the distance to the model's hidden states, squared and relative to these. None
        where layers do not end in a linear module that is added; then nothing was changed.
    """
    _, own = layers_of(student)
    name = last_linear(student, own[0], rows[0])
    if name is None:
        return None
    ends = [index - 1 for index in [*layers[1:], model.config.num_hidden_layers]]
    wanted = [outputs_at(model, ends, row, columns) for row in rows]
    states: list[Any] = [None] * len(rows)
    left = []
    for place, layer in enumerate(own):
        module: Any = layer.get_submodule(name)
        ran = [run_alone(student, own, place, module, row, state) for row, state in zip(rows, states, strict=True)]
        inputs = torch.cat([each for each, _ in ran]).float()
        missing = torch.cat([of_row[place] - output for of_row, (_, output) in zip(wanted, ran, strict=True)]).float()
        # Relative to its token's size: some tokens are a thousand times as large as the others.
        scale = torch.cat([of_row[place] for of_row in wanted]).float().norm(dim=1, keepdim=True)
        change = least_squares(inputs / scale, missing / scale)
        module.weight += change.T if isinstance(module, nn.Linear) else change
        states = [(output + each.float() @ change).to(output.dtype)[None] for each, output in ran]
        left.append(float(((missing - inputs @ change) / scale).square().sum(1).mean()))
    return left


def least_squares(inputs: Tensor, wanted: Tensor) -> Tensor:
    """[M, D]: the map of inputs [N, M] that comes nearest to `wanted` [N, D], small where the inputs leave it open."""
    gram = inputs.T @ inputs
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    found: Tensor = torch.linalg.solve(gram, inputs.T @ wanted)
    return found


@torch.no_grad()
def last_linear(model: Any, layer: nn.Module, row: Tensor) -> str | None:
    """The name in a layer of the linear module that runs last, if the layer's output is its output and a sum with it.

    That is tried out: with the opposite weights, the rest of the output must stay what it is, but for rounding.
    """
    names = {module: name for name, module in layer.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    order: list[nn.Module] = []
    hooks = [module.register_forward_hook(lambda ran, *_: order.append(ran)) for module in names]
    model.base_model(row, use_cache=False)
    for hook in hooks:
        hook.remove()
    if not order:
        return None
    last: Any = order[-1]
    whole, rests = last.weight.clone(), []
    try:
        for factor in (1.0, -1.0):
            last.weight.copy_(whole * factor)
            with recorded(layer) as of_layer, recorded(last) as of_last:
                model.base_model(row, use_cache=False)
            if not isinstance(of_layer.output, Tensor) or of_layer.output.shape != of_last.output.shape:
                return None
            rests.append((of_layer.output - of_last.output).float())
    finally:
        last.weight.copy_(whole)
    rounding = 8 * torch.finfo(whole.dtype).eps * of_layer.output.float().norm(dim=-1)
    return names[last] if ((rests[0] - rests[1]).norm(dim=-1) <= rounding).all() else None


class Record:
    """What a module was given first, and what it gave."""

    inputs: Tensor
    output: Any


@contextmanager
def recorded(module: nn.Module) -> Iterator[Record]:
    record = Record()

    def keep(_: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        record.inputs, record.output = inputs[0], output

    hook = module.register_forward_hook(keep)
    try:
        yield record
    finally:
        hook.remove()


def outputs_at(model: Any, layers: Sequence[int], row: Tensor, columns: Tensor | None) -> list[Tensor]:
    """The hidden states [S, D] after each of these layers."""
    _, own = layers_of(model)
    found: dict[int, Tensor] = {}
    hooks = [
        own[index].register_forward_hook(lambda _, inputs, output, index=index: found.update({index: output[0]}))
        for index in layers
    ]
    model.base_model(row, use_cache=False)
    for hook in hooks:
        hook.remove()
    return [found[index] if columns is None else found[index][:, columns] for index in layers]


def run_alone(
    model: Any, own: nn.ModuleList, place: int, module: nn.Module, row: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Run one layer on `state`, what the layer before gave: (inputs of its module [S, M], its output [S, D])."""
    others = [layer for index, layer in enumerate(own) if index != place]
    for layer in others:  # the model makes masks and positions for each layer; those that do not matter give `state` on
        layer.forward = lambda hidden, *_, **__: hidden if state is None else state
    try:
        with recorded(module) as of_module, recorded(own[place]) as of_layer:
            model.base_model(row, use_cache=False)
    finally:
        for layer in others:
            del layer.forward
    return of_module.inputs[0], of_layer.output[0]
