"""For each teacher token the student token that is spelled most alike (MinED, of FuseLLM, arXiv 2401.10491).

Tokens are compared as the bytes they stand for (`vocabulary_bytes`): the space markers of both sides are one,
"Ċ" is "<0x0A>", and a character is the same in a byte-level vocabulary as in any other.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist

from dskd.config.errors import one_line
from dskd.data.alignment import BYTE_PIECE, END_OF_TEXT, SILENT_ROLES, IntArray, Tokenizer, vocabulary_bytes
from dskd.rundir.files import written

LOG = logging.getLogger("dskd")
Tell = Callable[[int, int], None]

BLOCK_CELLS = 2**25  # distances held at once, of one byte each (two if a token is longer than 255 bytes)


@dataclass(frozen=True)
class VocabularyMap:
    """Where each teacher token goes in the student's vocabulary.

    `student_ids` [V_teacher]: the student token of least edit distance in bytes, or -1.
    `distance` [V_teacher]: that distance, or -1.
    `teacher_hash`, `student_hash`: the `vocabulary_hash` of the two tokenizers.

    A teacher token is "exact" at distance 0. It is "none" (-1) if the nearest token has nothing in common
    with it, that is, if the distance is the length of the longer one; or if it is a special token that the
    student lacks. Otherwise it is "near". EOS goes to EOS, exactly; BOS, PAD and ids without a token go
    nowhere. V_teacher is that of the tokenizer: a model's head may be padded to more rows.
    """

    student_ids: npt.NDArray[np.int32]
    distance: npt.NDArray[np.int16]
    teacher_hash: str
    student_hash: str

    @property
    def exact(self) -> int:
        """The number of teacher tokens that the student has too."""
        return int(np.count_nonzero(self.distance == 0))

    @property
    def near(self) -> int:
        """The number of teacher tokens that go to a similar student token."""
        return int(np.count_nonzero(self.distance > 0))

    @property
    def none(self) -> int:
        """The number of teacher tokens that go nowhere."""
        return int(np.count_nonzero(self.distance < 0))


def build_vocabulary_map(
    teacher_tokenizer: Tokenizer,
    student_tokenizer: Tokenizer,
    progress: Tell | None = None,
    workers: int = -1,
) -> VocabularyMap:
    """Look up the teacher tokens that the student has, and search the nearest student token of the others.

    Of equally near tokens the lowest id is taken, but a byte-fallback piece ("<0x41>") only if no other token
    ("A") is as near: the student's tokenizer uses it only where it has nothing else.

    Args:
        progress: called with (done, total) while searching, in teacher tokens.
        workers: threads that search, -1 for one a core.
    """
    teacher_pieces, student_pieces = _pieces(teacher_tokenizer), _pieces(student_tokenizer)
    student_ids = _exact_ids(teacher_pieces, student_pieces).astype(np.int32)
    distance = np.where(student_ids >= 0, 0, -1).astype(np.int16)
    teacher, student = teacher_pieces.ordinary, student_pieces.ordinary
    missing, candidates = [piece for piece in teacher if piece not in student], list(student)
    for piece, nearest, edits in zip(missing, *_nearest(missing, candidates, progress, workers), strict=True):
        if edits < max(len(piece), len(candidates[nearest])):
            student_ids[teacher[piece]], distance[teacher[piece]] = student[candidates[nearest]][0], edits
    hashes = vocabulary_hash(teacher_tokenizer), vocabulary_hash(student_tokenizer)
    return VocabularyMap(student_ids, distance, *hashes)


def exact_ids(teacher_tokenizer: Tokenizer, student_tokenizer: Tokenizer) -> IntArray:
    """[V_teacher]: the student token that stands for the same bytes, or is the same special token; -1 for none."""
    return _exact_ids(_pieces(teacher_tokenizer), _pieces(student_tokenizer))


def load_or_build(
    cache_dir: Path,
    teacher_tokenizer: Tokenizer,
    student_tokenizer: Tokenizer,
    progress: Tell | None = None,
    workers: int = -1,
) -> VocabularyMap:
    """The map from its file in `cache_dir`, which is made if missing; see `build_vocabulary_map`.

    The file's name states both vocabularies, and it appears whole or not at all: processes that start at once
    may each build it, to the same result. One that is damaged, or holds something else, is made anew.
    """
    expected = vocabulary_hash(teacher_tokenizer), vocabulary_hash(student_tokenizer)
    path = cache_dir / f"vocabulary_map_{expected[0][:16]}_{expected[1][:16]}.npz"
    if path.exists():
        try:
            return load(path, expected)
        except ValueError as error:
            LOG.warning(f"{path} is not used and made anew: {error}")
    made = build_vocabulary_map(teacher_tokenizer, student_tokenizer, progress, workers)
    save(path, made)
    return made


def save(path: Path, vocabulary_map: VocabularyMap) -> None:
    """Write the map so that `path` never shows a part of it, whoever else writes it at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written(path) as temporary, temporary.open("wb") as file:
        np.savez(
            file,
            student_ids=vocabulary_map.student_ids,
            distance=vocabulary_map.distance,
            hashes=np.array([vocabulary_map.teacher_hash, vocabulary_map.student_hash]),
            checksum=np.array(checksum(vocabulary_map)),
        )


def load(path: Path, hashes: tuple[str, str]) -> VocabularyMap:
    """Read what `save` wrote for these two vocabularies. Raises `ValueError` with the reason where it is not that."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            names = arrays["hashes"].tolist()
            found = VocabularyMap(arrays["student_ids"], arrays["distance"], *names)
            sealed = arrays["checksum"].item() if "checksum" in arrays else None
            own = checksum(found)
    except Exception as error:  # zip, zlib and NumPy's reading of headers each have errors of their own
        raise ValueError(f"it cannot be read: {one_line(str(error), 200)}") from None
    if (found.teacher_hash, found.student_hash) != hashes:
        raise ValueError("it maps other vocabularies")
    if sealed != own:
        raise ValueError("it has no checksum" if sealed is None else "its checksum is wrong")
    return found


def checksum(vocabulary_map: VocabularyMap) -> str:
    """sha256 over all that a map holds."""
    found = hashlib.sha256(f"{vocabulary_map.teacher_hash} {vocabulary_map.student_hash}".encode())
    for array in (vocabulary_map.student_ids, vocabulary_map.distance):
        found.update(f" {array.dtype.str} {array.shape} ".encode() + array.tobytes())
    return found.hexdigest()


def vocabulary_hash(tokenizer: Tokenizer) -> str:
    """sha256 over all tokens with their ids, the added tokens, and the ids of BOS, EOS, PAD, SEP and CLS."""
    added = tokenizer.added_tokens_decoder
    content = {
        "tokens": sorted(tokenizer.get_vocab().items()),
        "added": [(index, str(added[index].content), bool(added[index].special)) for index in sorted(added)],
        "roles": [getattr(tokenizer, role, None) for role in (*SILENT_ROLES, "eos_token_id")],
    }
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


@dataclass(frozen=True)
class _Pieces:
    """The ids of each non-empty piece of text and of each special piece, both in order of preference."""

    ordinary: dict[bytes, list[int]]
    special: dict[bytes, list[int]]
    ids: int
    """One more than the largest id."""


def _exact_ids(teacher: _Pieces, student: _Pieces) -> IntArray:
    found = np.full(teacher.ids, -1, np.int64)
    for pieces, known in ((teacher.ordinary, student.ordinary), (teacher.special, student.special)):
        for piece in pieces.keys() & known.keys():
            found[pieces[piece]] = known[piece][0]
    return found


def _pieces(tokenizer: Tokenizer) -> _Pieces:
    pieces = vocabulary_bytes(tokenizer)
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    fallback = {index for token, index in tokenizer.get_vocab().items() if BYTE_PIECE.fullmatch(token)}
    ordinary_ids: dict[bytes, list[int]] = {}
    special_ids: dict[bytes, list[int]] = {}
    for index in sorted(range(len(pieces)), key=lambda index: (index in fallback, index)):
        if piece := pieces[index]:
            ids = special_ids if index in special or piece == END_OF_TEXT else ordinary_ids
            ids.setdefault(piece, []).append(index)
    return _Pieces(ordinary_ids, special_ids, len(pieces))


def _nearest(
    queries: Sequence[bytes], candidates: Sequence[bytes], progress: Tell | None, workers: int
) -> tuple[list[int], list[int]]:
    """For each query the index of the first of its nearest candidates, and the distance."""
    groups = {size: (index, [candidates[i] for i in index]) for size, index in _by_length(candidates).items()}
    rows_at_once = BLOCK_CELLS // max((len(index) for index, _ in groups.values()), default=1) + 1
    nearest, distance = np.zeros(len(queries), np.int64), np.zeros(len(queries), np.int64)
    done = 0
    for index in _by_length(queries).values():
        for block in np.split(index, range(rows_at_once, len(index), rows_at_once)):
            nearest[block], distance[block] = _nearest_of_length([queries[i] for i in block], groups, workers)
            done += len(block)
            if progress is not None:
                progress(done, len(queries))
    return nearest.tolist(), distance.tolist()


def _nearest_of_length(
    queries: Sequence[bytes], groups: Mapping[int, tuple[IntArray, Sequence[bytes]]], workers: int
) -> tuple[IntArray, IntArray]:
    """`_nearest` for queries of one length.

    Strings whose lengths differ by n are at least n apart. So candidates are taken in order of that
    difference until it exceeds a query's best distance; equality included, for an equally near one may come
    first in their order.
    """
    length, longest = len(queries[0]), max(len(queries[0]), *groups)
    dtype = np.min_scalar_type(longest)
    nearest, distance = np.zeros(len(queries), np.int64), np.full(len(queries), longest + 1)
    for difference in range(longest + 1):
        rows = np.flatnonzero(distance >= difference)
        if not len(rows):
            break
        open_queries = [queries[row] for row in rows]
        for size in {length - difference, length + difference} & groups.keys():
            index, candidates = groups[size]
            cells = cdist(open_queries, candidates, scorer=Levenshtein.distance, dtype=dtype, workers=workers)
            column = cells.argmin(axis=1)
            found, first = cells[np.arange(len(rows)), column].astype(np.int64), index[column]
            closer = (found < distance[rows]) | (found == distance[rows]) & (first < nearest[rows])
            nearest[rows[closer]], distance[rows[closer]] = first[closer], found[closer]
    return nearest, distance


def _by_length(pieces: Sequence[bytes]) -> dict[int, IntArray]:
    """The increasing indices of the pieces of each length."""
    lengths = np.fromiter(map(len, pieces), np.int64, len(pieces))
    return {int(length): np.flatnonzero(lengths == length) for length in np.unique(lengths)}
