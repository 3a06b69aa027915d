"""A model's shape and its number of weights, from config.json alone; exact where the weights lie beside it."""

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from dskd.config.errors import UserError, shown
from dskd.config.run import require_folder

LONGEST_HEADER = 2**27
"""Bytes of a safetensors file's header; one of a 72B model has 40 kB."""
FUSED_ACTIVATIONS = ("gelu", "gelu_pytorch_tanh", "relu", "silu", "swish")
"""Keep their input alone for the backward pass; others are written out in Python and keep each step of theirs."""

DROPOUTS = ("resid_pdrop", "attn_pdrop", "hidden_dropout", "attention_dropout")


@dataclass(frozen=True)
class ModelShape:
    """A decoder: what its memory and its work follow from."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    inner: int
    """Width of a layer's feed-forward part."""
    vocabulary: int
    """Rows of embeddings and head."""
    positions: int
    """Rows of learned position embeddings; 0 without."""
    tied: bool
    """Whether head and embeddings are one matrix."""
    gated: bool
    """Whether the feed-forward part has three matrices and norms have no bias, as in Llama; else two, as in GPT-2."""
    fused_activation: bool
    dropout: bool
    """Whether activations are dropped in training."""
    weights: int
    """All of the model's weights, each once."""

    @property
    def head_weights(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def body_weights(self) -> int:
        """Those of the layers, which a token goes through; without embeddings and head."""
        return self.weights - self.head_weights * (1 if self.tied else 2) - self.positions * self.hidden

    @property
    def layer_weights(self) -> int:
        return self.body_weights // self.layers

    @property
    def attention_width(self) -> int:
        return self.heads * self.head_size


def read_shape(folder: Path, key: str) -> ModelShape:
    """The shape of the model in `folder`.

    Raises:
        UserError: naming `key`, where there is no config.json, or it describes something else than a plain decoder.
    """
    require_folder(key, folder, "config.json")
    file = folder / "config.json"
    try:
        config = json.loads(file.read_bytes())
    except OSError as error:
        raise UserError(f"{key}: {file} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise UserError(f"{key}: {file} holds no JSON object")
    text = config.get("text_config")
    shape = shape_of({**config, **text} if isinstance(text, dict) else config, f"{key}: {file}")
    return replace(shape, weights=saved_weights(folder) or shape.weights)


def shape_of(config: Mapping[str, Any], where: str) -> ModelShape:
    """The shape that the fields of a configuration describe; `where` names it in errors."""
    experts = next((name for name in config if name in ("num_experts", "num_local_experts", "n_routed_experts")), None)
    if experts is not None:
        raise UserError(f"{where}: {experts}: the memory of a mixture of experts is not known to `dskd plan`")
    number = partial(field, config, where)
    hidden = number("hidden_size", "n_embd")
    heads = number("num_attention_heads", "n_head")
    usual = 0.1 if "n_embd" in config else 0.0
    activation = str(config.get("hidden_act") or config.get("activation_function") or "gelu")
    shape = ModelShape(
        hidden=hidden,
        layers=number("num_hidden_layers", "n_layer"),
        heads=heads,
        kv_heads=number("num_key_value_heads", default=heads),
        head_size=number("head_dim", default=max(1, hidden // heads)),
        inner=number("intermediate_size", "n_inner", default=4 * hidden),
        vocabulary=number("vocab_size"),
        positions=number("n_positions", default=0),
        tied=bool(config.get("tie_word_embeddings", True)),  # transformers' own default
        gated="rms_norm_eps" in config,
        fused_activation=activation in FUSED_ACTIVATIONS,
        dropout=any(config.get(name, usual) for name in DROPOUTS),
        weights=0,
    )
    return replace(shape, weights=counted_weights(shape))


def field(config: Mapping[str, Any], where: str, *names: str, default: int | None = None) -> int:
    """A whole number above 0 under the first of these names that is set."""
    found = next((config[name] for name in names if config.get(name) is not None), default)
    if found is None:
        raise UserError(f"{where}: {names[0]} is missing")
    if isinstance(found, bool) or not isinstance(found, int) or not 0 <= found < 2**31 or (not found and default != 0):
        raise UserError(f"{where}: {names[0]}: a whole number above 0 is expected, got {shown(found)}")
    return found


def counted_weights(shape: ModelShape) -> int:
    """Weights by the usual architecture; biases, which some families have at some places, are left out (0.1 %)."""
    attention = shape.hidden * shape.head_size * 2 * (shape.heads + shape.kv_heads)
    feed_forward = (3 if shape.gated else 2) * shape.hidden * shape.inner
    norms = 2 * shape.hidden
    ends = shape.head_weights * (1 if shape.tied else 2) + shape.positions * shape.hidden
    return shape.layers * (attention + feed_forward + norms) + shape.hidden + ends


def saved_weights(folder: Path) -> int:
    """Numbers in the model's safetensors files, from their headers; 0 without any. Raises `UserError` for a broken one.

    Some folders hold the same weights once more in the format of another program, under other names.
    """
    files = list(folder.glob("model*.safetensors")) or list(folder.glob("*.safetensors"))
    return sum(sum(sizes_in(file).values()) for file in files)


def sizes_in(file: Path) -> dict[str, int]:
    """How many numbers each tensor of a safetensors file has."""
    try:
        with file.open("rb") as read:
            (length,) = struct.unpack("<Q", read.read(8))
            header = json.loads(read.read(min(length, LONGEST_HEADER)))
        return {name: math.prod(about["shape"]) for name, about in header.items() if name != "__metadata__"}
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, struct.error, RecursionError):
        raise UserError(f"{file}: is no safetensors file") from None
