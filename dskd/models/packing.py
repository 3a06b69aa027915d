"""Bodies without padding: a micro-batch is one row of tokens, and only attention sees the records in it as a batch.

A row of its own for each record is what the fastest kernels of attention want, and attention is a small part of a body;
what is most of it, products with weights, runs over tokens alone.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

PACKED = "dskd_packed"
"""What transformers knows this attention by."""


def packed_inputs(places: Tensor, records: int, longest: int) -> dict[str, Tensor]:
    """What a body is told of a packed micro-batch beside its tokens, once its attention is `packed_attention`.

    Args:
        places: [T], where in records x longest, flattened, each token would stand.
    """
    # transformers hands on a mask of four dimensions as it is. This one takes the room of `places` alone.
    return {"attention_mask": places.expand(records, longest, 1, -1), "position_ids": (places % longest)[None]}


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """transformers' `sdpa`, and the same for a mask of `packed_inputs`; query, key and value [1, heads, T, D]."""
    if attention_mask is None or attention_mask.dtype != torch.int64:
        same: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **more
        )
        return same
    records, longest, _, _ = attention_mask.shape
    places, window = attention_mask[0, 0, 0], more.get("sliding_window")
    rows = [in_rows(each, places, records, longest) for each in (query, key, value)]
    mask = None if window is None or window >= longest else window_mask(longest, window, places.device)
    # Padding is on the right, where causal attention never looks: it needs no mask.
    output, _ = sdpa_attention_forward(module, *rows, mask, dropout, scaling, **(more | {"is_causal": True}))
    return output.flatten(0, 1)[places][None], None


def in_rows(states: Tensor, places: Tensor, records: int, longest: int) -> Tensor:
    """[1, heads, T, D] -> [records, heads, longest, D], 0 where there is no token."""
    _, heads, _, width = states.shape
    rows = states.new_zeros(records * longest, heads, width).index_copy(0, places, states[0].transpose(0, 1))
    return rows.view(records, longest, heads, width).transpose(1, 2)


def window_mask(longest: int, window: int, device: torch.device) -> Tensor:
    """[1, 1, longest, longest]: the `window` tokens up to each, itself included."""
    back = torch.arange(longest, device=device)[:, None] - torch.arange(longest, device=device)
    return ((back >= 0) & (back < window))[None, None]


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)
