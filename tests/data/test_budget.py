"""Micro-batches of so many tokens: none has more, ranks have equally many, and records stay where they are."""

from hypothesis import given
from hypothesis import strategies as st

from dskd.data.budget import Budget

LONGEST = 50
lengths = st.lists(st.tuples(st.integers(1, LONGEST), st.integers(1, LONGEST)), min_size=12, max_size=12)


def tokens_of(own: list[tuple[int, int]], packed: bool) -> int:
    """What stands in memory for a micro-batch, of the larger side."""
    sides = list(zip(*own, strict=True))
    return max(sum(side) for side in sides) if packed else len(own) * max(map(max, own))


def fewest(own: list[tuple[int, int]], budget: int, packed: bool) -> int:
    """Parts of neighbours that fit, by trying all first parts."""
    if not own:
        return 0
    fitting = [n for n in range(1, len(own) + 1) if tokens_of(own[:n], packed) <= budget]
    return 1 + min(fewest(own[n:], budget, packed) for n in fitting)


@given(lengths, st.integers(LONGEST, 400), st.sampled_from([1, 2, 3, 4, 6, 12]), st.booleans())
def test_no_micro_batch_has_more_tokens_and_ranks_have_equally_many(lengths, tokens, ranks, packed):
    records = list(range(100, 112))
    parts = Budget(tokens, lambda i: lengths[i - 100], packed).cut(records, ranks)
    assert [i for part in parts for i in part] == records
    assert all(parts)
    assert len(parts) % ranks == 0
    assert max(tokens_of([lengths[i - 100] for i in part], packed) for part in parts) <= tokens


@given(lengths.map(lambda own: sorted(own[:7])), st.integers(LONGEST, 200), st.booleans())
def test_no_more_micro_batches_than_have_to_be(lengths, tokens, packed):
    parts = Budget(tokens, lengths.__getitem__, packed).cut(range(len(lengths)), 1)
    assert len(parts) == fewest(lengths, tokens, packed)


@given(lengths.map(sorted), st.booleans())
def test_the_largest_is_as_small_as_it_can_be(lengths, packed):
    """Two parts: whatever else is cut where, one of them is as large."""
    parts = Budget(12 * LONGEST, lengths.__getitem__, packed).cut(range(12), 2)
    largest = max(tokens_of([lengths[i] for i in part], packed) for part in parts)
    assert largest == min(max(tokens_of(lengths[:n], packed), tokens_of(lengths[n:], packed)) for n in range(1, 12))
