"""Settings of the student and the teacher."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from dskd.config.errors import MOST, require, require_at_most

ModelPath = Annotated[Path, "a folder, or the name org/model of one that was downloaded from the Hugging Face hub"]
TeacherBackend = Literal["resident", "sharded", "cache"]


@dataclass(frozen=True)
class LoraConfig:
    rank: int = 256
    """Rank of the low-rank update."""
    alpha: int = 8
    """Scale of the update; it is multiplied by alpha / rank."""
    dropout: float = 0.1
    """Dropout before the update, in [0, 1)."""
    targets: tuple[str, ...] = ()
    """Endings of the module names to adapt, or [all-linear]; empty takes PEFT's choice for the model's family."""

    def __post_init__(self) -> None:
        require(self.rank > 0, "rank", f"must be above 0, got {self.rank}")
        require_at_most(self, MOST, "rank", "alpha")
        require(0 <= self.dropout < 1, "dropout", f"must be in [0, 1), got {self.dropout}")


@dataclass(frozen=True)
class StudentConfig:
    path: ModelPath
    """Folder of the student as Hugging Face saves it, or the name org/model of one in the local hub cache."""
    lora: LoraConfig | None = None
    """Train a low-rank adapter instead of all weights."""
    trust_remote_code: bool = False
    """Run Python code that lies in the model's folder. Leave it off unless you have read that code."""


@dataclass(frozen=True)
class TeacherConfig:
    path: ModelPath
    """Folder of the teacher as Hugging Face saves it, or the name org/model of one in the local hub cache."""
    adapter: ModelPath | None = None
    """Folder of a LoRA adapter that is merged into the teacher after loading."""
    backend: TeacherBackend = "resident"
    """Where its hidden states come from: a copy on every rank; one copy, split over the ranks and gathered layer by
    layer; or the files that `dskd teacher cache` wrote."""
    cache_precision: Literal["exact", "fp8", "int8"] = "exact"
    """How a cache stores them: as they are, or in a byte a value with one scale a token."""
    shard_group: Literal["all", "node"] = "all"
    """Of a teacher that is split, the ranks that share a copy: all, or those of a node, which talk faster."""
    offload: Literal["none", "cpu"] = "none"
    """Whether the pieces of a teacher that is split wait in CPU memory; without a GPU they do anyway."""
    quantize: Literal["none", "int8"] = "none"
    """Hold the weights of its layers in a byte each, on a GPU, by bitsandbytes; head and embeddings stay whole."""
    trust_remote_code: bool = False
    """Run Python code that lies in the model's folder. Leave it off unless you have read that code."""

    def __post_init__(self) -> None:
        if self.quantize != "none":
            require(self.backend != "sharded", "quantize", f"{self.quantize} needs backend resident, or cache")
            require(self.adapter is None, "quantize", f"{self.quantize} takes no adapter: merge it into a model before")
        for key, usual in (("shard_group", "all"), ("offload", "none")):
            value = getattr(self, key)
            require(
                value == usual or self.backend != "resident",
                key,
                f"{value} needs backend sharded, or cache for making it",
            )
