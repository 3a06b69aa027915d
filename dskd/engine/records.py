"""The records of a run, as all ranks read them."""

from pathlib import Path

from dskd.config.run import RunConfig
from dskd.data.records import Records, read_records
from dskd.data.sources import is_plain, lines_of
from dskd.data.tokenization import Tokenizer
from dskd.engine.distributed import Ranks


def read_run_records(run: RunConfig, file: Path, tokenizer: Tokenizer, ranks: Ranks) -> Records:
    """The records of data.train or data.dev; of another form than lines the main rank makes lines first. Collective.

    Args:
        tokenizer: the student's.
    """
    if is_plain(file):
        return read_records(file)
    ranks.together(lambda: str(lines_of(file, tokenizer, run.cache_folder)) if ranks.is_main else None)
    return read_records(lines_of(file, tokenizer, run.cache_folder))
