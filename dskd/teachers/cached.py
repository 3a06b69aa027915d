"""The teacher as files that `dskd teacher cache` wrote; nothing but its head is in memory."""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from dskd.config.errors import UserError
from dskd.config.models import TeacherConfig
from dskd.config.run import RunConfig
from dskd.data.batch import Batch
from dskd.engine.distributed import Ranks
from dskd.losses.tensors import Model
from dskd.models.load import DTYPES
from dskd.models.views import check_rows
from dskd.teachers.cache.ends import CachedEnds, read_ends
from dskd.teachers.cache.folder import CacheFolder, described, nearest_difference
from dskd.teachers.cache.pieces import Piece
from dskd.teachers.cache.precision import stored_dtype
from dskd.teachers.cache.read import StoredStates, open_pieces


class CachedTeacher:
    """Passes on what the data workers have read (implements `Teacher`)."""

    def __init__(self, ends: CachedEnds, stored: StoredStates) -> None:
        self.head_and_embeddings, self.stored = ends, stored

    @property
    def ends(self) -> Model:
        return self.head_and_embeddings

    def states(self, batches: Sequence[Batch]) -> Iterator[Tensor]:
        for batch in batches:
            assert batch.states is not None
            yield batch.states


def load_cached(run: RunConfig, settings: TeacherConfig, tokenizer: Any, ranks: Ranks) -> CachedTeacher:
    """The teacher of a run from its cache. Raises `UserError` where there is none that fits. Collective."""
    about = described(run, settings, ranks)
    folder = CacheFolder.of(run, about)
    if not folder.ends.is_file():
        near = nearest_difference(run, about)
        raise UserError(
            f"teacher.backend: there is no cache of this teacher in {run.cache_folder}"
            f"{near and f' ({near})'}; run: dskd teacher cache RUN.yaml"
        )
    dtype = DTYPES[run.engine.precision]
    ends, pieces = read_ends(folder.ends, dtype, ranks.device), open_pieces(folder)
    check_rows(len(ends.embeddings), tokenizer, "teacher.path")
    for piece in pieces:
        check_piece(piece, ends.hidden_size, stored_dtype(settings.cache_precision, dtype))
    return CachedTeacher(ends, StoredStates(folder, pieces, dtype))


def check_piece(piece: Piece, width: int, dtype: Any) -> None:
    """Raise `UserError` for a piece that belongs to another cache."""
    if (piece.width, piece.dtype) != (width, dtype):
        raise UserError(
            f"teacher.backend: {piece.file} holds states {piece.width} wide in {piece.dtype}; "
            f"{width} in {dtype} are expected"
        )
