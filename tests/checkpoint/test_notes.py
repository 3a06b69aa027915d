"""What a state's files say of themselves: told where it is nonsense, before anything is read by it."""

import json

import pytest
import torch
from safetensors.torch import save_file

from dskd.checkpoint.shards import NOTES, WEIGHT, PieceReader


def read(tmp_path, notes: str | None, tensor: torch.Tensor | None = None) -> torch.Tensor:
    file = tmp_path / "rank0.safetensors"
    save_file(
        {f"{WEIGHT}:a": torch.arange(6.0) if tensor is None else tensor},
        file,
        None if notes is None else {NOTES: notes},
    )
    with PieceReader([file]) as saved:
        return saved.read(WEIGHT, "a", 1, 4)


def pieces(*piece: object) -> str:
    return json.dumps({"pieces": {"a": piece}})


def test_what_is_sound_is_read(tmp_path):
    assert read(tmp_path, pieces(0, 6, 3)).tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("notes", [None, "", "{", "[]", "3", "[" * 100_000, "9" * 10_000])
def test_no_notes(tmp_path, notes):
    with pytest.raises(ValueError, match=r"does not say what it holds$"):
        read(tmp_path, notes)


@pytest.mark.parametrize(
    "notes",
    [
        *("{}", '{"pieces": 3}', '{"pieces": []}', '{"pieces": {"a": 3}}', '{"pieces": {"a": [0, 6]}}'),
        *(
            pieces(0, 6, "3"),
            pieces(-1, 6, 3),
            pieces(0, 1e999, 3),
            pieces(0, 6, None),
            pieces(0, 2**70, 3),
            pieces(0, True, 3),
        ),
    ],
)
def test_no_table_of_pieces(tmp_path, notes):
    with pytest.raises(ValueError, match=r"does not say which parts of the parameters it holds$"):
        read(tmp_path, notes)


@pytest.mark.parametrize("shape", [(3,), (2, 3), (6, 1)])
def test_a_tensor_of_another_shape_than_its_table_tells(tmp_path, shape):
    with pytest.raises(ValueError, match=r"^a: another shape than its file tells$"):
        read(tmp_path, pieces(0, 6, 3), torch.ones(shape))
