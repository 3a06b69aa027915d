"""How much of a shard `dskd teacher cache` has made, as it tells in the folder of --output."""

import hashlib
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import cattrs

from dskd.config.errors import UserError
from dskd.config.load import to_yaml
from dskd.config.run import RunConfig
from dskd.rundir.content import sum_of
from dskd.rundir.files import read_json, write_json
from dskd.rundir.layout import RunDirectory


@dataclass(frozen=True)
class ShardProgress:
    cache: Path
    """Folder of the cache."""
    file: Path
    """Of the training records."""
    content: str
    """sha256 of that file."""
    settings: str
    """sha256 of the run file, resolved."""
    wanted: int
    """Records of the shard."""
    made: int
    """So many of them are in the cache."""

    @property
    def is_complete(self) -> bool:
        """Whether nothing is left to make: the records are those of then, and the cache is still there."""
        return self.made == self.wanted and self.cache.is_dir() and self.is_current

    @property
    def is_current(self) -> bool:
        return self.file.is_file() and sum_of(self.file) == self.content

    def __str__(self) -> str:
        return f"{self.made:,} of {self.wanted:,} records"


def settings_sum(settings: RunConfig | str) -> str:
    """The sum of a run file, or of its text."""
    text = settings if isinstance(settings, str) else to_yaml(settings)
    return hashlib.sha256(text.encode()).hexdigest()


def write_shard(directory: RunDirectory, progress: ShardProgress) -> None:
    write_json(directory.shard, asdict(progress) | {"cache": str(progress.cache), "file": str(progress.file)})


def read_shard(directory: RunDirectory) -> ShardProgress | None:
    """None where no shard of a cache is made, or where the file is damaged: the next start writes it anew."""
    with suppress(UserError, cattrs.BaseValidationError, TypeError, ValueError, KeyError):
        found = read_json(directory.shard)
        return None if found is None else cattrs.structure(found, ShardProgress)
    return None
