"""How many weights a LoRA adapter has."""

from dskd.config.models import LoraConfig
from dskd.plan.shape import ModelShape


def adapter_weights(shape: ModelShape, settings: LoraConfig) -> int:
    """A matrix of n x m gets rank x (n + m).

    By default PEFT adapts queries and values, or the one matrix that makes all three; other targets than that are
    counted as all matrices of a layer, which is an upper bound.
    """
    attention, keys = shape.attention_width, shape.kv_heads * shape.head_size
    queries, values = shape.hidden + attention, shape.hidden + keys
    sides = queries + values
    if settings.targets:
        feed_forward = (3 if shape.gated else 2) * (shape.hidden + shape.inner)
        sides = 2 * queries + 2 * values + feed_forward
    return shape.layers * settings.rank * sides
