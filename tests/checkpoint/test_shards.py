"""Parameters in pieces: what several ranks wrote is read as one, whoever asks for which part of it."""

import json
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from dskd.checkpoint.shards import Piece, PieceReader, gap, own_share

SIZE = 23


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pieces")


def write(folder, bounds, steps=7):
    """One file for each span between two bounds; the values are their own places."""
    files = []
    for rank, (start, end) in enumerate(pairwise(bounds)):
        files.append(folder / f"rank{rank}.safetensors")
        table = {"w": [start, end - start, steps + rank]}
        values = torch.arange(start, end, dtype=torch.float32)
        save_file({"weight:w": values, "exp_avg:w": -values}, files[-1], {"notes": json.dumps({"pieces": table})})
    return files


@given(cuts=st.sets(st.integers(1, SIZE - 1), max_size=5), span=st.tuples(*[st.integers(0, SIZE)] * 2))
def test_any_part_is_read_out_of_the_files_of_any_number_of_ranks(folder, cuts, span):
    start, end = sorted(span)
    with PieceReader(write(folder, [0, *sorted(cuts), SIZE])) as saved:
        assert saved.read("weight", "w", start, end - start).tolist() == list(range(start, end))
        assert saved.read("exp_avg", "w", start, end - start).tolist() == [-i for i in range(start, end)]
        assert saved.step("w") == 7 + len(cuts)


def test_values_that_no_rank_wrote_are_told(tmp_path):
    first, _, third = write(tmp_path, [0, 5, 9, SIZE])
    with PieceReader([first, third]) as saved:
        assert saved.read("weight", "w", 9, 3).tolist() == [9, 10, 11]
        with pytest.raises(ValueError, match=f"w: 19 of {SIZE} values are in the state"):
            saved.read("weight", "w", 0, SIZE)


@given(size=st.integers(0, 40), ranks=st.integers(1, 9), offset=st.integers(0, 3), start=st.integers(0, 3))
def test_of_what_all_ranks_hold_each_value_is_written_once(size, ranks, offset, start):
    master = torch.arange(offset + size)
    whole = Piece("w", master, offset, start, size)
    shares = [own_share(whole, rank, ranks) for rank in range(ranks)]
    assert torch.cat([share.of(master) for share in shares]).tolist() == whole.of(master).tolist()
    assert [share.start - start for share in shares] == [share.offset - offset for share in shares]
    assert gap("w", [(share.start - start, share.count) for share in shares if share.count], size) is None


@pytest.mark.parametrize(
    ("spans", "problem"),
    [
        ([(5, 5), (0, 5)], None),
        ([(0, 5), (6, 4)], "w: value 5 is held by no rank"),
        ([(0, 5), (4, 6)], "w: value 4 is held twice"),
        ([(0, 9)], "w: 9 of its 10 values are held"),
    ],
)
def test_spans_must_cover_a_parameter_once(spans, problem):
    assert gap("w", spans, 10) == problem
