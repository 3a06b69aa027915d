"""Hidden states of records by their token ids, read in the processes that make batches."""

from collections import OrderedDict
from collections.abc import Callable, Container, Sequence
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dskd.config.errors import UserError
from dskd.data.records import Records, told
from dskd.data.tokenization import Limits, Sample, Tokenizer, tokenize
from dskd.data.vocabulary_map import vocabulary_hash
from dskd.engine.distributed import Ranks
from dskd.teachers.cache.folder import CacheFolder, differences
from dskd.teachers.cache.pieces import DamagedPiece, Piece, open_piece, record_key, text_key
from dskd.teachers.cache.precision import decode

OPEN_FILES = 256
MAKE = "dskd teacher cache RUN.yaml"
LOOKED_AT = 100
"""Records that are tokenized even where their texts are known."""


class OpenFiles:
    """Files stay open, since opening one costs a round trip on shared storage; the longest unused are closed."""

    def __init__(self) -> None:
        self.handles: OrderedDict[Path, FileIO] = OrderedDict()

    def __reduce__(self) -> tuple[Any, ...]:
        return OpenFiles, ()

    def of(self, file: Path) -> int:
        if file not in self.handles:
            self.handles[file] = file.open("rb", buffering=0)
        self.handles.move_to_end(file)
        if len(self.handles) > OPEN_FILES:
            self.handles.popitem(last=False)[1].close()
        return self.handles[file].fileno()


class StoredStates:
    """All records of some pieces; a `dskd.data.loader.ReadStates`."""

    def __init__(self, folder: CacheFolder, pieces: Sequence[Piece], dtype: torch.dtype) -> None:
        """`dtype`: of the hidden states, whatever they are stored in."""
        self.folder, self.pieces, self.dtype, self.files = folder, pieces, dtype, OpenFiles()
        self.places = {key: (piece, i) for piece in pieces for i, key in enumerate(piece.keys)}

    def __contains__(self, key: object) -> bool:
        return key in self.places

    def __call__(self, samples: Sequence[Sample]) -> Tensor:
        """Hidden states [N, D] of the response tokens of some records. Raises `UserError` where a piece is damaged."""
        return torch.cat([self.states(record_key(sample)) for sample in samples])

    def states(self, key: bytes) -> Tensor:
        if key not in self.places:
            raise UserError(f"teacher.backend: a record is not in the cache {self.folder.path}; run: {MAKE}")
        piece, record = self.places[key]
        with told(piece.file):
            return decode(piece.read(self.files.of(piece.file), record), self.dtype)


def made_with(tokenizer: Tokenizer, limits: Limits) -> dict[str, Any]:
    """What makes token ids of a record, to name what changed where none of them are found."""
    return {
        "data.max_length": limits.max_length,
        "data.max_prompt_length": limits.max_prompt_length,
        "data.bos": limits.bos,
        "tokenizer": vocabulary_hash(tokenizer)[:16],
    }


def open_pieces(folder: CacheFolder, damaged: Callable[[Path, str], None] | None = None) -> list[Piece]:
    """The pieces of a cache. One that is damaged is left out where `damaged` is told of it, and else raised."""
    found = []
    for file in folder.pieces():
        try:
            found.append(open_piece(file))
        except FileNotFoundError:  # a task that writes has just set it aside
            continue
        except DamagedPiece as error:
            if damaged is None:
                raise
            damaged(file, str(error))
    return found


def check_complete(stored: StoredStates, records: Records, tokenizer: Tokenizer, limits: Limits, ranks: Ranks) -> None:
    """Raise `UserError` on all ranks where a record is not in the cache; each rank looks at its share. Collective."""
    absent, texts = 0, known_texts(stored.pieces, stored, records, tokenizer, limits)
    for index in range(ranks.rank, len(records), ranks.world_size):
        record = records[index]
        if text_key(record) not in texts:
            absent += record_key(tokenize(tokenizer, record, limits)) not in stored
        ranks.flags.moved()
    total = ranks.sum_int(absent)
    if not total:
        return
    here = made_with(tokenizer, limits)
    changes = min((differences(here, piece.made_with) for piece in stored.pieces), key=len, default=[])
    why = f", which was made with another {', '.join(changes)}" if changes else ""
    raise UserError(
        f"teacher.backend: {total:,} of {len(records):,} records of {records.file} are not in the cache "
        f"{stored.folder.path}{why}; run: {MAKE}"
    )


def known_texts(
    pieces: Sequence[Piece], keys: Container[bytes], records: Records, tokenizer: Tokenizer, limits: Limits
) -> set[bytes]:
    """The texts of which states are there: a million records are looked up so in seconds, and tokenized in minutes.

    Only pieces of the same limits and vocabulary count, and none where one of the first records has other tokens than
    the piece that knows its text: tokenizers of one vocabulary may still cut texts at different places.

    Args:
        keys: of all that is there.
    """
    here = made_with(tokenizer, limits)
    texts = {text for piece in pieces if piece.made_with == here for text in piece.texts}
    for record in records[:LOOKED_AT]:
        if text_key(record) in texts and record_key(tokenize(tokenizer, record, limits)) not in keys:
            return set()
    return texts
