"""Settings of the records and their tokenization."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dskd.config.errors import MOST, require, require_at_most

Form = Literal["lines", "array", "csv", "parquet"]


def form_of(file: Path) -> Form:
    """How a file holds its records: Parquet and CSV by name, a JSON array by how it begins, else lines of JSON."""
    if file.suffix in (".parquet", ".csv"):
        return "parquet" if file.suffix == ".parquet" else "csv"
    if file.suffix != ".json":
        return "lines"
    with file.open("rb") as content:
        return "array" if content.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[") else "lines"


@dataclass(frozen=True)
class DataConfig:
    train: Path
    """Training records: one JSON object a line, {"prompt": text, "output": text or list of texts}, or a conversation,
    {"messages": [{"role": ..., "content": ...}]}; such objects in a JSON array, Parquet or CSV too."""
    dev: Path
    """Records that every evaluation during training uses."""
    max_length: int = 512
    """Tokens of prompt and response together, on each side; longer responses are cut at the end."""
    max_prompt_length: int = 256
    """Tokens of the prompt; longer prompts lose their beginning."""
    bos: bool = False
    """Put the tokenizer's BOS token before the prompt."""
    workers: int = 1
    """Processes for each rank that tokenize and align ahead of the training thread; 0 does it on that thread."""

    cache_dir: Path | None = None
    """Folder for vocabulary maps and teacher caches, which many runs share; empty means output.root/cache."""

    def __post_init__(self) -> None:
        require(self.max_prompt_length > 0, "max_prompt_length", f"must be above 0, got {self.max_prompt_length}")
        require(
            self.max_prompt_length < self.max_length,
            "max_prompt_length",
            f"must be below max_length ({self.max_length}) so that a response fits, got {self.max_prompt_length}",
        )
        require(self.workers >= 0, "workers", f"must not be negative, got {self.workers}")
        require_at_most(self, MOST, "max_length")
        require_at_most(self, 256, "workers")
