"""The files of a cache: hidden states of many records, and in the same file the index that finds them.

A piece appears whole or not at all and is never written to again. How it is laid out says dskd/teachers/README.md.
"""

import hashlib
import json
import os
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dskd.config.errors import UserError
from dskd.data.records import Record
from dskd.data.shard import Shard
from dskd.data.tokenization import Sample
from dskd.rundir.files import UMASK, persistently, written
from dskd.teachers.cache.folder import FORMAT, CacheFolder
from dskd.teachers.cache.precision import Stored

INDEX = {"keys": torch.uint8, "offsets": torch.int64, "checksums": torch.int64}
INDEX |= {"scales": torch.float32, "texts": torch.uint8}  # which a piece need not have
TEXT_BYTES = 16
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "I8": torch.int8, "F8_E4M3": torch.float8_e4m3fn}


class DamagedPiece(UserError):
    """A file of a cache that does not hold what was written to it."""

    def __init__(self, file: Path, problem: str) -> None:
        super().__init__(
            f"teacher.backend: {file} is damaged: {problem}; `dskd teacher cache RUN.yaml` sets it aside and makes its "
            "records again"
        )


@dataclass(frozen=True)
class Piece:
    """What the index of a piece says. R records, T tokens."""

    file: Path
    keys: tuple[bytes, ...]  # R
    texts: tuple[bytes, ...]  # R, or none
    offsets: NDArray[np.int64]  # [R + 1], the first row of each record, and T
    checksums: NDArray[np.int64]  # [R], of each record's rows and scales
    scales: Tensor | None  # [T] fp32
    begin: int  # byte of the file at which the rows begin
    width: int  # D
    dtype: torch.dtype
    made_with: Mapping[str, Any]
    """The limits and the tokenizer that gave the token ids, for messages."""

    def read(self, handle: int, record: int) -> Stored:
        """What is stored of a record, from the open file. Raises `DamagedPiece`."""
        first, last = self.offsets[record : record + 2].tolist()
        rows = torch.empty((last - first, self.width), dtype=self.dtype)
        place = self.begin + first * self.width * rows.element_size()
        persistently(lambda: read_into(rows, handle, place))
        stored = Stored(rows, None if self.scales is None else self.scales[first:last])
        if checksum(stored) != self.checksums[record]:
            raise DamagedPiece(self.file, f"record {record} of it has another checksum than its index says")
        return stored


def record_key(sample: Sample) -> bytes:
    """sha256 of a record's token ids: how many the prompt has, the prompt, the response, as little-endian int64."""
    ids = np.concatenate([[len(sample.prompt)], sample.prompt, sample.response]).astype("<i8")
    return hashlib.sha256(ids.tobytes()).digest()


def text_key(record: Record) -> bytes:
    """The beginning of the sha256 of a record's texts: what is known of it before it is tokenized."""
    prompt = record.prompt.encode()
    return hashlib.sha256(struct.pack("<q", len(prompt)) + prompt + record.outputs[0].encode()).digest()[:TEXT_BYTES]


def write_piece(
    folder: CacheFolder,
    shard: Shard,
    keys: Sequence[bytes],
    records: Sequence[Stored],
    made_with: Mapping[str, Any],
    texts: Sequence[bytes] = (),
) -> Path:
    """Publish the states of some records; the name tells which records they are."""
    lengths = [len(record.rows) for record in records]
    index = {
        "keys": torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).view(-1, 32),
        "offsets": torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int64),
        "checksums": torch.tensor([checksum(record) for record in records], dtype=torch.int64),
    }
    if texts:
        index["texts"] = torch.frombuffer(bytearray(b"".join(texts)), dtype=torch.uint8).view(-1, TEXT_BYTES)
    scales = [record.scales for record in records if record.scales is not None]
    if scales:
        index["scales"] = torch.cat(scales)
    about = {"format": str(FORMAT), "made_with": json.dumps(made_with), "index": str(index_checksum(index))}
    file = folder.piece(shard, hashlib.sha256(b"".join(keys)).hexdigest()[:12])

    def write() -> None:
        with written(file) as temporary:
            save_file(index | {"states": torch.cat([record.rows for record in records])}, temporary, about)
            temporary.chmod(0o666 & ~UMASK)  # the library hides its files from the group

    persistently(write)
    return file


def open_piece(file: Path) -> Piece:
    """The index of a piece. Raises `DamagedPiece` where it is not whole, OSError where it is not there."""
    try:
        return persistently(lambda: read_index(file))
    except (OSError, UserError):
        raise
    except Exception as error:  # safetensors' own error, and what a file that it takes may still lack
        raise DamagedPiece(file, str(error)) from None


def read_index(file: Path) -> Piece:
    with safe_open(file, "pt") as data:
        about = data.metadata() or {}
        index = {name: data.get_tensor(name) for name in data.keys() if name != "states"}  # noqa: SIM118
        states = data.get_slice("states")
        (tokens, width), kind = states.get_shape(), states.get_dtype()
    if about.get("format") != str(FORMAT):
        raise UserError(f"teacher.backend: {file} has format {about.get('format')}; this dskd reads format {FORMAT}")
    if about.get("index") != str(index_checksum(index)):
        raise ValueError("its index has another checksum")
    keys, offsets, checksums = index["keys"].numpy(), index["offsets"].numpy(), index["checksums"].numpy()
    scales, made_with = index.get("scales"), json.loads(about["made_with"])
    texts = index.get("texts", torch.empty((0, TEXT_BYTES), dtype=torch.uint8)).numpy()
    if (
        any(tensor.dtype != INDEX.get(name) for name, tensor in index.items())
        or not (offsets[0] == 0 and offsets[-1] == tokens and (np.diff(offsets) >= 0).all())
        or len(offsets) != len(checksums) + 1
        or keys.shape != (len(checksums), 32)
        or texts.shape not in ((len(checksums), TEXT_BYTES), (0, TEXT_BYTES))
        or not (scales is None or scales.shape == (tokens,))
        or not isinstance(made_with, dict)
    ):
        raise ValueError("its index does not fit its states")
    return Piece(
        file,
        tuple(row.tobytes() for row in keys),
        tuple(row.tobytes() for row in texts),
        offsets,
        checksums,
        scales,
        first_byte(file),
        width,
        DTYPES[kind],
        made_with,
    )


def first_byte(file: Path) -> int:
    """Where the states begin in a file whose header safetensors has checked: a length, that much JSON, the data."""
    with file.open("rb") as data:
        (length,) = struct.unpack("<Q", data.read(8))
        header = json.loads(data.read(length))
    place: int = 8 + length + header["states"]["data_offsets"][0]
    return place


def damage(piece: Piece) -> str | None:
    """What is wrong with a piece of which every byte is read; None where nothing is."""
    with piece.file.open("rb") as data:
        try:
            for record in range(len(piece.keys)):
                piece.read(data.fileno(), record)
        except DamagedPiece as error:
            return str(error)
    return None


def read_into(rows: Tensor, handle: int, place: int) -> None:
    """Fill a tensor from a file. What the file lacks stays as it is, and the checksum will tell."""
    rest = bytes_of(rows)
    while rest and (count := os.preadv(handle, [rest], place)):
        rest, place = rest[count:], place + count


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor, flat."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def checksum(stored: Stored) -> int:
    """CRC-32 of a record's rows, and of its scales after them."""
    found = zlib.crc32(bytes_of(stored.rows.contiguous()))
    return found if stored.scales is None else zlib.crc32(bytes_of(stored.scales), found)


def index_checksum(index: Mapping[str, Tensor]) -> int:
    """CRC-32 of the tensors of an index, in the order of their names."""
    found = 0
    for name in sorted(index):
        found = zlib.crc32(bytes_of(index[name].contiguous()), found)
    return found
