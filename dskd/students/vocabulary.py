"""Another vocabulary for a model: each new token's embedding from the old tokens of the same bytes."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from dskd.data.alignment import BYTE_PIECE, END_OF_TEXT, SILENT_ROLES, vocabulary_bytes
from dskd.data.tokenization import Tokenizer

ROLES = ("eos_token_id", *SILENT_ROLES, "unk_token_id")


@torch.no_grad()
def transplant(model: Any, old: Tokenizer, new: Tokenizer) -> None:
    """Give a model the vocabulary of `new`, in place.

    A token that the old vocabulary has too, by its bytes, keeps its embedding. Any other has the mean of the old tokens
    that its bytes fall into. Special tokens take those of the same role, EOS where the old tokenizer has no such role.
    Embeddings and head alike.
    """
    sources = token_sources(old, new)
    tables = [averaged(tensor, sources) for tensor in ends_of(model)]
    model.resize_token_embeddings(len(sources), mean_resizing=False)
    for tensor, table in zip(ends_of(model), tables, strict=True):
        tensor.copy_(table)
    for role in ("eos_token_id", "bos_token_id", "pad_token_id"):
        setattr(model.config, role, getattr(new, role, None))
    model.generation_config = GenerationConfig.from_model_config(model.config)


def ends_of(model: Any) -> list[Tensor]:
    """Weights and biases with a row for each token, each once where embeddings and head share it."""
    modules = model.get_input_embeddings(), model.get_output_embeddings()
    tensors = [getattr(module, name, None) for module in modules for name in ("weight", "bias")]
    return list({id(tensor): tensor for tensor in tensors if tensor is not None}.values())


def averaged(table: Tensor, sources: Sequence[Sequence[int]]) -> Tensor:
    """[V_new, ...]: the mean of the old rows of each new token; of all rows where it has none."""
    everything = table.float().mean(0)
    rows = [table[list(ids)].float().mean(0) if ids else everything for ids in sources]
    return torch.stack(rows).to(table.dtype)


def token_sources(old: Tokenizer, new: Tokenizer) -> list[list[int]]:
    """For each new token id the old ids that stand for it."""
    old_pieces, new_pieces = vocabulary_bytes(old), vocabulary_bytes(new)
    fallback = {index for token, index in old.get_vocab().items() if BYTE_PIECE.fullmatch(token)}
    ids: dict[bytes, int] = {}
    for index in sorted(range(len(old_pieces)), key=lambda index: (index in fallback, index)):
        if old_pieces[index] not in (b"", END_OF_TEXT):
            ids.setdefault(old_pieces[index], index)
    longest = max(map(len, ids))
    sources = [segment(piece, ids, longest) for piece in new_pieces]
    for role in reversed(ROLES):  # EOS last: it is often the token of another role too
        own, same = getattr(new, role, None), getattr(old, role, None)
        if own is not None:
            sources[own] = [old.eos_token_id if same is None else same]
    return sources


def segment(piece: bytes, ids: Mapping[bytes, int], longest: int) -> list[int]:
    """The old tokens that a piece falls into, from its beginning, the longest first; bytes that none has are skipped.

    Args:
        longest: bytes of the longest old token.
    """
    found, start = [], 0
    while start < len(piece):
        ends = range(min(len(piece), start + longest), start, -1)
        end = next((end for end in ends if piece[start:end] in ids), None)
        if end is not None:
            found.append(ids[piece[start:end]])
        start = end or start + 1
    return found
