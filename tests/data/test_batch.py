"""Padded batches against a plain reference, token by token."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dskd.data.batch import Batch, Side, collate, joined
from dskd.data.tokenization import Sample


def sample(prompt: list[int], response: list[int]) -> Sample:
    return Sample(np.array(prompt, np.int64), np.array(response, np.int64))


def reference(samples: list[Sample]) -> tuple[list[list[int]], list[tuple[int, int, int, int]]]:
    """Token rows without padding, and (row, place, token, next token) wherever the next token is of the response."""
    rows = [[*s.prompt.tolist(), *s.response.tolist()] for s in samples]
    pairs = [
        (row, place, tokens[place], tokens[place + 1])
        for row, tokens in enumerate(rows)
        for place in range(len(tokens) - 1)
        if place + 1 >= len(samples[row].prompt)
    ]
    return rows, pairs


def assert_is_reference(side: Side, samples: list[Sample], pad_id: int) -> None:
    rows, pairs = reference(samples)
    width = max(map(len, rows))
    assert side.input_ids.tolist() == [row + [pad_id] * (width - len(row)) for row in rows]
    assert side.attention_mask.tolist() == [[1] * len(row) + [0] * (width - len(row)) for row in rows]
    assert side.positions.tolist() == [row * width + place for row, place, _, _ in pairs]
    assert side.inputs.tolist() == [token for _, _, token, _ in pairs]
    assert side.labels.tolist() == [label for _, _, _, label in pairs]
    assert side.lengths == tuple(sum(row == r for row, *_ in pairs) for r in range(len(rows)))
    assert all(getattr(side, name).dtype == torch.int64 for name in ("input_ids", "attention_mask", "positions"))


ids = st.integers(0, 5)
samples_ = st.lists(st.builds(sample, st.lists(ids, max_size=4), st.lists(ids, min_size=1, max_size=4)), min_size=1)


@given(samples_, ids)
def test_a_batch_is_what_the_plain_reference_says(samples, pad_id):
    """Token ids are few, so that the padding's id is that of a real token or of EOS as well."""
    assert_is_reference(collate(samples, pad_id), samples, pad_id)


@given(samples_)
def test_a_packed_batch_is_the_padded_one_without_padding(samples):
    padded, packed = collate(samples), collate(samples, packed=True)
    tokens = padded.attention_mask.flatten().nonzero().squeeze(-1)
    assert torch.equal(packed.places, tokens)
    assert torch.equal(packed.input_ids[0], padded.input_ids.flatten()[tokens])
    assert torch.equal(packed.places[packed.positions], padded.positions)
    for name in ("attention_mask", "inputs", "labels"):
        assert torch.equal(getattr(packed, name), getattr(padded, name))
    assert packed.lengths == padded.lengths


@given(st.lists(samples_, min_size=1, max_size=4), st.booleans())
def test_micro_batches_joined_are_one_of_all_samples(batches, packed):
    found = joined([collate(samples, packed=packed) for samples in batches])
    expected = collate([sample for samples in batches for sample in samples], packed=packed)
    assert found.lengths == expected.lengths
    for name in ("input_ids", "attention_mask", "positions", "inputs", "labels", *(["places"] if packed else [])):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


def test_an_example_by_hand():
    side = collate([sample([5, 6], [7, 2]), sample([], [8, 9, 2])], pad_id=2)
    assert side.input_ids.tolist() == [[5, 6, 7, 2], [8, 9, 2, 2]]
    assert side.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert side.positions.tolist() == [1, 2, 4, 5]
    assert side.inputs.tolist() == [6, 7, 8, 9]
    assert side.labels.tolist() == [7, 2, 9, 2]
    assert side.lengths == (2, 2)


def test_a_lone_token_without_prompt_is_predicted_by_nothing():
    side = collate([sample([], [2]), sample([1], [2])])
    assert side.lengths == (0, 1)
    assert side.labels.tolist() == [2]
    assert collate([sample([], [2])]).positions.numel() == 0


@pytest.mark.parametrize("shared", [True, False])
def test_moving_keeps_values_and_what_both_models_share(shared):
    student = collate([sample([1], [2, 3])])
    batch = Batch((4,), student, student if shared else collate([sample([5], [6])]))
    moved = batch.to(torch.device("cpu"))
    assert (moved.teacher is moved.student) == shared
    assert moved.records == (4,)
    assert moved.student.lengths == (2,)
    assert moved.teacher.labels.tolist() == batch.teacher.labels.tolist()
