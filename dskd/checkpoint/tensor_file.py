"""What safetensors writes for some tensors, byte by byte, and in pieces, so that it can be hashed on its way to a disk.

safetensors' own writer holds the interpreter while it writes, and tells nothing of the bytes. The format is a length, a
header in JSON, and the tensors' values (https://huggingface.co/docs/safetensors#format).
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

DTYPES = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Names of the types, in the order in which safetensors puts tensors into a file; those of one type follow by name."""
PLACES = {dtype: place for place, dtype in enumerate(DTYPES)}
ALIGNMENT = 8
"""Bytes; spaces after the header let the values begin at a multiple of it."""


@dataclass(frozen=True)
class TensorFile:
    """The content of a safetensors file; each iteration makes it anew."""

    tensors: Mapping[str, Tensor]
    """On any device; they come to the host one after the other."""
    metadata: Mapping[str, str] | None = None

    def __iter__(self) -> Iterator[memoryview]:
        names = sorted(self.tensors, key=lambda name: (PLACES[self.tensors[name].dtype], name))
        yield memoryview(self.header(names))
        for name in names:
            yield self.tensors[name].cpu().contiguous().view(-1).view(torch.uint8).numpy().data

    def header(self, names: list[str]) -> bytes:
        listed: dict[str, object] = {} if self.metadata is None else {"__metadata__": self.metadata}
        end = 0
        for name in names:
            tensor = self.tensors[name]
            start, end = end, end + tensor.nbytes
            listed[name] = {
                "dtype": DTYPES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [start, end],
            }
        text = json.dumps(listed, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-len(text) % ALIGNMENT)
        return len(text).to_bytes(8, "little") + text
