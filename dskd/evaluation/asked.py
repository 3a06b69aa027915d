"""What `dskd generate` is asked for. No torch."""

import glob
from dataclasses import asdict, dataclass
from pathlib import Path

from dskd.config.training import Engine, GenerationConfig
from dskd.data.shard import Shard
from dskd.evaluation.kept import identity_of
from dskd.rundir.content import model_content, sum_of
from dskd.rundir.layout import part_of


@dataclass(frozen=True)
class Generation:
    """What is asked for."""

    model: Path
    data: Path
    out: Path
    seed: int
    settings: GenerationConfig
    precision: str
    bos: bool = False
    whole: bool = False
    """Leave out answers that the limit cut."""
    engine: Engine = "dskd"

    def identity(self) -> str:
        content = {"model": model_content(self.model).files, "records": sum_of(self.data)}
        how = {"generation": asdict(self.settings), "precision": self.precision, "bos": self.bos}
        return identity_of(content | how | {"seed": self.seed, "whole": self.whole, "engine": self.engine})

    @property
    def card(self) -> Path:
        """What the finished file is, beside it."""
        return self.out.with_name(f"{self.out.name}.card.json")

    @property
    def parts(self) -> list[Path]:
        """What tasks have made so far."""
        return sorted(self.out.parent.glob(f"{glob.escape(self.out.name)}.*-of-*.partial"))

    def part(self, shard: Shard) -> Path:
        return part_of(self.out, shard.index, shard.count)
