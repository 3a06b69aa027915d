"""Which teacher token corresponds to which student token, when the two tokenizers differ.

Two answers, pure functions on plain data, meant for collate workers:

- `exact_pairs`: tokens that cover exactly the same bytes of the same text (exact token alignment, ETA, of
  DSKDv2, arXiv 2504.11426). It works on the bytes that each token stands for, `vocabulary_bytes`.
- `minimum_edit_alignment`: the cheapest time-warping path between the two token lists under the edit distance
  of token strings (MinED, of FuseLLM, arXiv 2401.10491). It covers every token of both sides.

Both take a text to be the same on both sides. A tokenizer may normalise it (Qwen: to NFC): do that first.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist

from dskd.config.errors import UserError, shown

IntArray = npt.NDArray[np.int64]
Costs = npt.NDArray[np.int32]
Align = Callable[[Sequence[int], Sequence[int]], IntArray]
"""Token ids of a response, the teacher's and the student's -> [M, 2] rows of (teacher index, student index)."""

# The piece of each tokenizer's end-of-sequence token, whatever its name ("</s>", "<|endoftext|>"). The byte
# 0xFF is never part of UTF-8: EOS pairs with EOS where the texts are equal up to it, and with nothing else.
END_OF_TEXT = b"\xff</s>"
# Control tokens that add nothing to the text.
SILENT_ROLES = ("bos_token_id", "pad_token_id", "sep_token_id", "cls_token_id")

SPACE_MARKERS = ("\u0120", "\u2581")  # of byte-level vocabularies, and of SentencePiece
BYTE_PIECE = re.compile("<0x([0-9A-Fa-f]{2})>")
UNREACHABLE = 2**30  # above any path cost; int32 holds its sum with one


class Tokenizer(Protocol):
    """What is used of a Hugging Face tokenizer, and `backend_tokenizer`, `<role>_token_id` where present."""

    @property
    def added_tokens_decoder(self) -> Mapping[int, Any]: ...

    def get_vocab(self) -> dict[str, int]: ...

    def __len__(self) -> int: ...

    def __hash__(self) -> int: ...


def vocabulary_bytes(tokenizer: Tokenizer) -> list[bytes]:
    """The bytes that each token id stands for in the decoded text. Compute it once, then index it.

    - An ordinary token: what the tokenizer's own decoder makes of it. A part of a multi-byte character stays
      what it is; so does a leading space, even that of a text's first token, which decoding may strip.
    - EOS: `END_OF_TEXT` for every tokenizer. BOS, PAD, SEP, CLS, and ids without a token: b"".
    - Any other special token: its literal string, e.g. b"<|im_start|>", which is what a tokenizer that lacks
      the token sees in the same text.

    Raises UserError if the decoder has a step that is unknown here.
    """
    added = tokenizer.added_tokens_decoder
    vocabulary = tokenizer.get_vocab() | {str(token.content): index for index, token in added.items()}
    steps = _decoder_steps(tokenizer, vocabulary)
    # An added token is matched as plain text, not in the byte alphabet. SentencePiece vocabularies, though,
    # list ordinary pieces (runs of the space marker) as added tokens: there only special ones are literal.
    byte_level = any(step["type"] == "ByteLevel" for step in steps)
    literal = {index for index, token in added.items() if token.special or byte_level}
    pieces = [b""] * (max(vocabulary.values(), default=-1) + 1)
    for token, index in vocabulary.items():
        pieces[index] = token.encode() if index in literal else _decode(token, steps)
    # EOS last: many tokenizers pad with it, and gpt2 has one token for all roles.
    for role in (*SILENT_ROLES, "eos_token_id"):
        role_id: int | None = getattr(tokenizer, role, None)
        if role_id is not None:
            pieces[role_id] = END_OF_TEXT if role == "eos_token_id" else b""
    return pieces


def token_bytes(tokenizer: Tokenizer, ids: Sequence[int]) -> list[bytes]:
    """The pieces of `ids`, as `vocabulary_bytes` defines them, from a table kept for the last few tokenizers.

    The table is made anew after tokens were added, not after a change of role (another EOS): use
    `vocabulary_bytes` then. Raises ValueError for an id outside the vocabulary, such as the label -100.
    """
    table = _cached_table(tokenizer, len(tokenizer))
    if ids and not 0 <= min(ids) <= max(ids) < len(table):
        raise ValueError(f"token ids must be in [0, {len(table)}), got {min(ids)} to {max(ids)}")
    return [table[index] for index in ids]


@lru_cache(maxsize=4)
def _cached_table(tokenizer: Tokenizer, size: int) -> list[bytes]:
    return vocabulary_bytes(tokenizer)


def _decoder_steps(tokenizer: Tokenizer, vocabulary: Mapping[str, int]) -> list[Mapping[str, Any]]:
    """What the tokenizer's decoder does to one token at a time, in the terms of `tokenizer.json`."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = json.loads(backend.to_str())["decoder"] if backend is not None else None
    if decoder is None:
        return _steps_of_vocabulary(vocabulary)
    steps: list[Mapping[str, Any]] = []
    for step in decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]:
        match step:
            case {"type": "Fuse"}:
                break  # what follows works on the whole text: it strips the first token's space
            case {"type": "ByteLevel" | "ByteFallback" | "Metaspace"}:
                steps.append(step)
            case {"type": "Replace", "pattern": {"String": _}}:
                steps.append(step)
            case _:
                name = type(tokenizer).__name__
                raise UserError(f"{name}: the bytes of its tokens are unclear: unknown decoder step {shown(step)}")
    return steps


def _steps_of_vocabulary(vocabulary: Mapping[str, int]) -> list[Mapping[str, Any]]:
    """For a tokenizer that shows no decoder (plain Python, sentencepiece): what its vocabulary shows."""
    if all(symbol in vocabulary for symbol in BYTE_OF_SYMBOL):
        return [{"type": "ByteLevel"}]
    metaspace = {"type": "Metaspace", "replacement": SPACE_MARKERS[1]}
    return [{"type": "ByteFallback"}, metaspace] if "<0x0A>" in vocabulary else [metaspace]


def _decode(token: str, steps: Sequence[Mapping[str, Any]]) -> bytes:
    for step in steps:
        match step:
            case {"type": "Replace", "pattern": {"String": marker}, "content": text}:
                token = token.replace(marker, text)
            case {"type": "Metaspace", "replacement": marker}:
                token = token.replace(marker, " ")
            case {"type": "ByteFallback"}:
                if piece := BYTE_PIECE.fullmatch(token):
                    return bytes.fromhex(piece[1])
            case {"type": "ByteLevel"}:
                # As the decoder does: a token with any symbol outside the alphabet is plain text.
                if all(symbol in BYTE_OF_SYMBOL for symbol in token):
                    return bytes([BYTE_OF_SYMBOL[symbol] for symbol in token])
    return token.encode()


def _byte_of_symbol() -> dict[str, int]:
    """The alphabet of byte-level BPE (GPT-2): printable Latin-1 as itself, the other bytes from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


BYTE_OF_SYMBOL = _byte_of_symbol()


def exact_pairs(teacher_pieces: Sequence[bytes], student_pieces: Sequence[bytes]) -> IntArray:
    """Tokens of both sides that cover exactly the same bytes of the same text (ETA, arXiv 2504.11426).

    Args: the pieces (see `token_bytes`) of one response on each side.
    Returns: [M, 2] rows of (teacher index, student index), increasing in both columns.

    Spans are compared on the common prefix of the two texts, which is all of the shorter one where a side is
    truncated. Where the texts diverge nothing behind is paired, even if bytes agree again there: teacher and
    student have read different contexts, and equal offsets need not be the same place any more. Where one
    text starts with one space more than the other (the dummy space of SentencePiece), that space is left out.
    A piece that covers no bytes has no partner.
    """
    teacher, student = b"".join(teacher_pieces), b"".join(student_pieces)
    surplus = _leading_spaces(teacher) - _leading_spaces(student)
    teacher_dummy, student_dummy = int(surplus == 1), int(surplus == -1)
    shared = _common_prefix(teacher[teacher_dummy:], student[student_dummy:])
    teacher_index, teacher_spans = _spans(teacher_pieces, teacher_dummy, shared)
    student_index, student_spans = _spans(student_pieces, student_dummy, shared)
    _, left, right = np.intersect1d(teacher_spans, student_spans, assume_unique=True, return_indices=True)
    return np.stack([teacher_index[left], student_index[right]], axis=1)


def _leading_spaces(text: bytes) -> int:
    return len(text) - len(text.lstrip(b" "))


def _common_prefix(left: bytes, right: bytes) -> int:
    size = min(len(left), len(right))
    differs = np.frombuffer(left, np.uint8, size) != np.frombuffer(right, np.uint8, size)
    return int(differs.argmax()) if differs.any() else size


def _spans(pieces: Sequence[bytes], dummy: int, limit: int) -> tuple[IntArray, IntArray]:
    """Indices of the pieces that cover bytes and end within `limit`; (start, end) of each as one number."""
    lengths = np.fromiter(map(len, pieces), np.int64, len(pieces))
    ends = lengths.cumsum() - dummy
    starts = np.maximum(ends - lengths, 0)  # below 0 is only the piece that holds the dummy space
    index = np.flatnonzero((ends > starts) & (ends <= limit))
    return index, starts[index] * (limit + 1) + ends[index]


@dataclass(frozen=True)
class Alignment:
    """A time-warping path of least cost.

    `cost` is the sum of the edit distances along the path. `pairs` [K, 2] holds its (teacher index, student
    index), from (0, 0) to the two last tokens; from row to row each index grows by 0 or 1, and not both by 0.
    Where a side is empty, `pairs` is empty and `cost` 0.
    """

    cost: int
    pairs: IntArray

    def teacher_tokens(self, student_length: int) -> list[list[int]]:
        """For each of the `student_length` student tokens, the increasing indices of its teacher tokens."""
        aligned: list[list[int]] = [[] for _ in range(student_length)]
        for teacher, student in self.pairs.tolist():
            aligned[student].append(teacher)
        return aligned


def minimum_edit_alignment(teacher_tokens: Sequence[str], student_tokens: Sequence[str]) -> Alignment:
    """The time-warping path of least total edit distance between two token lists (MinED, arXiv 2401.10491).

    Args: tokens as the vocabularies spell them (`convert_ids_to_tokens`); space markers do not count.

    D[i, j] = distance(student i, teacher j) + min(D[i-1, j-1], D[i-1, j], D[i, j-1]). Of equally cheap
    predecessors the path takes the diagonal, else the previous student token, else the previous teacher one.
    Time and memory (4 bytes a cell) grow with the product of the two lengths. Exact while no path costs 2^30.
    """
    if not teacher_tokens or not student_tokens:
        return Alignment(0, np.empty((0, 2), np.int64))
    costs = _path_costs(*_prefix_sums(teacher_tokens, student_tokens))
    return Alignment(int(costs[-1, -1]), _cheapest_path(costs))


def _prefix_sums(teacher: Sequence[str], student: Sequence[str]) -> tuple[Costs, list[int]]:
    """Distances summed up along the teacher, [U, T + 1] from 0, and each student token's row in it.

    There is a row for each of the U distinct student tokens: texts repeat their tokens, and a distance is
    computed once for each distinct pair.
    """
    teacher_distinct, teacher_rows = _distinct(teacher)
    student_distinct, student_rows = _distinct(student)
    distances = cdist(student_distinct, teacher_distinct, scorer=Levenshtein.distance, dtype=np.int32)
    sums = np.zeros((len(student_distinct), len(teacher) + 1), np.int32)
    along = sums[:, 1:]
    np.take(distances, teacher_rows, axis=1, out=along, mode="clip")  # "raise" would copy first
    np.cumsum(along, axis=1, dtype=np.int32, out=along)
    return sums, student_rows


def _distinct(tokens: Sequence[str]) -> tuple[list[str], list[int]]:
    byte_level, sentence_piece = SPACE_MARKERS
    row_of: dict[str, int] = {}
    rows = [
        row_of.setdefault(token.replace(byte_level, "").replace(sentence_piece, ""), len(row_of)) for token in tokens
    ]
    return list(row_of), rows


def _path_costs(sums: Costs, student_rows: Sequence[int]) -> Costs:
    """D of `minimum_edit_alignment`, [S + 1, T + 1] with a border of unreachable cells before it.

    With P[j] the distances of student token i to the teacher tokens up to j, D[i, j] - P[j] is the minimum
    over k <= j of min(D[i-1, k-1], D[i-1, k]) - P[k-1]: the path enters row i at k and walks on to j. So a
    row takes four vector operations, exact in integers.
    """
    costs = np.full((len(student_rows) + 1, sums.shape[1]), UNREACHABLE, np.int32)
    costs[0, 0] = 0
    before, up_to = list(sums[:, :-1]), list(sums[:, 1:])
    # Iterating over a matrix gives its rows cheaper than slicing does: a fifth of the time at 512 tokens.
    rows = zip(costs[:-1, 1:], costs[:-1, :-1], costs[1:, 1:], student_rows, strict=True)
    for above, diagonal, row, student in rows:
        np.minimum(above, diagonal, out=row)
        row -= before[student]
        np.minimum.accumulate(row, out=row)
        row += up_to[student]
    return costs


def _cheapest_path(costs: Costs) -> IntArray:
    """The path [K, 2] of (teacher index, student index), found backwards from the last cell."""
    cells = costs.ravel().data  # a memoryview reads single cells several times faster than an array
    width = costs.shape[1]
    student, teacher = costs.shape[0] - 1, width - 1
    path = [(teacher - 1, student - 1)]
    while student > 1 or teacher > 1:
        cell = student * width + teacher
        diagonal, above, left = cells[cell - width - 1], cells[cell - width], cells[cell - 1]
        if diagonal <= above and diagonal <= left:
            student, teacher = student - 1, teacher - 1
        elif above <= left:
            student -= 1
        else:
            teacher -= 1
        path.append((teacher - 1, student - 1))
    return np.array(path[::-1], np.int64)


def aligner(kind: Literal["none", "exact", "minimum_edit"], teacher: Tokenizer, student: Tokenizer) -> Align | None:
    """The alignment that a method asks for, between two tokenizers."""
    found = {"none": None, "exact": _exact_pairs_of_ids, "minimum_edit": _minimum_edit_pairs_of_ids}[kind]
    return None if found is None else partial(found, teacher, student)


def _exact_pairs_of_ids(teacher: Any, student: Any, teacher_ids: Sequence[int], student_ids: Sequence[int]) -> IntArray:
    return exact_pairs(token_bytes(teacher, teacher_ids), token_bytes(student, student_ids))


def _minimum_edit_pairs_of_ids(
    teacher: Any, student: Any, teacher_ids: Sequence[int], student_ids: Sequence[int]
) -> IntArray:
    """A response that was cut off is aligned with as much of the other side's as has the same bytes."""
    pieces = token_bytes(teacher, teacher_ids), token_bytes(student, student_ids)
    bytes_of_both = min(sum(map(len, side)) for side in pieces)
    tokens = []
    for tokenizer, ids, side in zip((teacher, student), (teacher_ids, student_ids), pieces, strict=True):
        starts = np.cumsum([0, *map(len, side)])[:-1]
        kept = [index for index, start in zip(ids, starts, strict=True) if start < bytes_of_both]
        spelled: list[str] = tokenizer.convert_ids_to_tokens(kept)
        # The end of the text is the same token whatever its name is.
        eos = tokenizer.eos_token_id
        tokens.append(["</s>" if i == eos else token for i, token in zip(kept, spelled, strict=True)])
    return minimum_edit_alignment(*tokens).pairs
