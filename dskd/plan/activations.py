"""What a decoder keeps for its backward pass: bytes for each layer, as the layers of transformers are written.

Upper bounds where a number depends on the batch: keys and values are counted once for each head, which is what happens
as soon as a batch has padding.
"""

from dataclasses import dataclass

from dskd.plan.shape import ModelShape

FP32 = 4


@dataclass(frozen=True)
class Batch:
    """A micro-batch of `records` samples, each padded to `tokens`."""

    records: int
    tokens: int

    @property
    def positions(self) -> int:
        return self.records * self.tokens


def kept_activations(shape: ModelShape, batch: Batch, size: int, checkpointing: bool, on_gpu: bool) -> int:
    """Bytes that the forward pass leaves behind.

    Args:
        size: bytes of a number.
    """
    # What the last norm gives is read once, at the response tokens, and then gone.
    last = batch.positions * (norm_bytes(shape, size) - shape.hidden * size + dropped_bytes(shape, size, on_gpu))
    if checkpointing:
        return last + shape.layers * batch.positions * shape.hidden * size
    return last + mask_bytes(batch) + shape.layers * layer_bytes(shape, batch, size, on_gpu)


def layer_bytes(shape: ModelShape, batch: Batch, size: int, on_gpu: bool) -> int:
    """Bytes that one layer keeps."""
    feed_forward = shape.inner * size * kept_of_inner(shape)
    twice = 2 * (norm_bytes(shape, size) + dropped_bytes(shape, size, on_gpu))
    return batch.positions * (twice + feed_forward) + attention_bytes(shape, batch, size, on_gpu)


def dropped_bytes(shape: ModelShape, size: int, on_gpu: bool) -> int:
    """Bytes for each position of what is dropped after the embeddings, attention and the feed-forward part."""
    return shape.hidden * (1 if on_gpu else size) if shape.dropout else 0


def attention_bytes(shape: ModelShape, batch: Batch, size: int, on_gpu: bool) -> int:
    """Queries, keys, values and result, and a number for each head and position."""
    width = shape.attention_width
    if on_gpu or not shape.dropout:
        return batch.positions * (4 * width * size + shape.heads * FP32)
    # On a CPU no fused attention knows dropout: it is written out in fp32, with weights, what drops them, and both.
    return (
        batch.positions * (3 * width * FP32 + width * size) + 3 * FP32 * batch.records * shape.heads * batch.tokens**2
    )


def kept_of_inner(shape: ModelShape) -> int:
    """Tensors of the feed-forward part's width: gate, its activation, up and their product; or input and output."""
    if shape.gated:
        return 4
    return 2 if shape.fused_activation else 5


def norm_bytes(shape: ModelShape, size: int) -> int:
    """Bytes for each position that a norm keeps: its input in fp32, that divided by its size, and its output.

    A LayerNorm is one operation and keeps its input and output.
    """
    return shape.hidden * (FP32 + 2 * size if shape.gated else 2 * size)


def mask_bytes(batch: Batch) -> int:
    """One for all layers."""
    return batch.records * batch.tokens**2


def running_layer(shape: ModelShape, batch: Batch, size: int) -> int:
    """Bytes that a layer needs while it runs without keeping anything, or that its gradients need."""
    return batch.positions * size * (3 * shape.inner + 4 * shape.hidden)
