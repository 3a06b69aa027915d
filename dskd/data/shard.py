"""A share of the records, which one task works on. Torch-free."""

import re
from dataclasses import dataclass
from typing import Self

from dskd.config.errors import UserError, shown


@dataclass(frozen=True)
class Shard:
    """Number `index`, from 0, of `count`."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Self:
        """From "I/N". Raises `UserError` for anything else."""
        found = re.fullmatch(r"(\d{1,5})/(\d{1,5})", text, re.ASCII)
        if found is None or not int(found[1]) < int(found[2]):
            raise UserError(f"--shard: I/N is expected, such as 0/4 to 3/4, got {shown(text)}")
        return cls(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @property
    def name(self) -> str:
        """As it stands in names of files."""
        return f"{self.index:05}-of-{self.count:05}"

    def holds(self, text: bytes) -> bool:
        """Whether it is this task that caches a record, by the sum of its texts: the place of it does not matter."""
        return int.from_bytes(text[:8]) % self.count == self.index

    def of_rank(self, rank: int, world_size: int) -> "Shard":
        """What one of the ranks that write this shard together does."""
        return Shard(self.index + self.count * rank, self.count * world_size)
