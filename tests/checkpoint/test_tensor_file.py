"""Files of tensors: byte for byte what safetensors itself writes, and their sums found on the way to the disk."""

import hashlib
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from dskd.checkpoint.tensor_file import DTYPES, TensorFile
from dskd.rundir import files
from dskd.rundir.files import entry, write_hashed

SHAPES = st.lists(st.integers(0, 3), max_size=3)
TENSORS = st.dictionaries(st.text(max_size=5), st.tuples(st.sampled_from(list(DTYPES)), SHAPES), max_size=6)


@settings(max_examples=50)
@given(TENSORS, st.none() | st.dictionaries(st.text(max_size=5), st.text(max_size=5), min_size=1, max_size=1))
def test_the_bytes_are_safetensors_own(drawn, metadata):
    tensors = {name: torch.randint(0, 2, shape).to(dtype) for name, (dtype, shape) in drawn.items()}
    content = TensorFile(tensors, metadata)
    assert b"".join(content) == save(tensors, metadata)
    assert b"".join(content) == b"".join(content)


def test_a_view_is_written_as_what_it_shows():
    whole = torch.arange(12.0).reshape(3, 4)
    found = load(b"".join(TensorFile({"row": whole[1], "column": whole[:, 1], "turned": whole.T})))
    assert found["row"].equal(whole[1])
    assert found["column"].equal(whole[:, 1])
    assert found["turned"].equal(whole.T)


def test_size_and_sum_are_those_of_the_file_whatever_its_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "BLOCK", 7)
    content = TensorFile({"a": torch.rand(5, 5), "b": torch.arange(9)})
    written = write_hashed(tmp_path / "file", content)
    assert written == entry(tmp_path / "file")
    assert written["sha256"] == hashlib.sha256(save(content.tensors)).hexdigest()


def test_nothing_of_a_file_stays_that_could_not_be_written(tmp_path):
    def failing():
        yield b"first"
        raise OSError(28, os.strerror(28))

    with pytest.raises(OSError, match="No space left"):
        write_hashed(tmp_path / "file", failing())
    assert list(tmp_path.iterdir()) == []
