"""Which records each rank gets in each step, and that nothing but the settings decides it."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from dskd.config.errors import UserError
from dskd.data.alignment import aligner, token_bytes
from dskd.data.batch import Batch, collate
from dskd.data.budget import Budget
from dskd.data.loader import Collator, Plan, Recent, Steps, evaluation_batches, load_steps, permutation
from dskd.data.records import Record, read_records
from dskd.data.tokenization import Limits, tokenize

LIMITS = Limits(24, 12)
RECORDS = tuple(Record("Where is Lima? " * (i % 4), (f"Lima lies by the sea{'.' * i}",)) for i in range(13))

sizes = st.lists(st.integers(0, 9), min_size=1, max_size=60).map(tuple)


def flat(micro_batches: list[list[int]]) -> list[int]:
    return [index for batch in micro_batches for index in batch]


@given(sizes, st.integers(0, 3), st.integers(1, 12), st.integers(0, 3))
def test_every_epoch_is_a_permutation_without_the_remainder(sizes, seed, size, epoch):
    assume(len(sizes) >= size)
    plan = Plan(sizes, seed, size, 1)
    steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
    used = [index for step in steps for index in plan.global_batch(step)]
    assert len(set(used)) == len(used) == len(sizes) - len(sizes) % size
    assert set(used) <= set(range(len(sizes)))


def test_what_is_left_out_differs_from_epoch_to_epoch():
    plan = Plan(tuple(range(10)), 1, 8, 4)
    assert len({frozenset(plan.global_batch(epoch)) for epoch in range(10)}) > 1


@settings(suppress_health_check=[HealthCheck.filter_too_much])
@given(sizes, st.integers(0, 3), st.integers(1, 3), st.integers(0, 9))
def test_micro_batches_do_not_depend_on_the_number_of_ranks(sizes, seed, micro, step):
    size = 4 * micro
    assume(len(sizes) >= size)
    plan = Plan(sizes, seed, size, micro)
    by_ranks = {n: [plan.micro_batches(step, rank, n) for rank in range(n)] for n in (1, 2, 4)}
    alone = by_ranks[1][0]
    assert flat(alone) == plan.global_batch(step)
    assert all(len(batch) == micro for batch in alone)
    for number, parts in by_ranks.items():
        assert [part[i] for i in range(4 // number) for part in parts] == alone


@given(sizes, st.integers(0, 3), st.integers(1, 12), st.integers(0, 20))
def test_records_of_like_length_stand_together(sizes, seed, size, step):
    assume(len(sizes) >= size)
    lengths = [sizes[index] for index in Plan(sizes, seed, size, 1).global_batch(step)]
    assert lengths == sorted(lengths)


def test_a_plan_is_a_pure_function_of_its_fields():
    plan = Plan(tuple(range(40)), 1, 8, 2)
    before = [plan.micro_batches(step, 0, 2) for step in range(20)]
    torch.manual_seed(5)
    again = Plan(tuple(range(40)), 1, 8, 2)
    assert [again.micro_batches(step, 0, 2) for step in reversed(range(20))][::-1] == before


def test_seeds_and_epochs_give_other_orders():
    orders = {
        tuple(i for step in range(5) for i in Plan((1,) * 40, seed, 8, 2).global_batch(5 * epoch + step))
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(orders) == 9


@pytest.fixture
def collator(tiny) -> Collator:
    return Collator(RECORDS, tiny.tokenizer("bytes"), tiny.tokenizer("pieces"), LIMITS)


def same(first: Batch, second: Batch) -> bool:
    fields = ("input_ids", "attention_mask", "positions", "inputs", "labels")
    pairs = ((first.student, second.student), (first.teacher, second.teacher))
    return first.records == second.records and all(
        a.lengths == b.lengths and all(torch.equal(getattr(a, name), getattr(b, name)) for name in fields)
        for a, b in pairs
    )


def test_two_tokenizers_give_two_sides(collator, tiny):
    batch = collator([3, 0, 7])
    assert batch.records == (3, 0, 7)
    for side, name in ((batch.student, "bytes"), (batch.teacher, "pieces")):
        expected = collate([tokenize(tiny.tokenizer(name), RECORDS[i], LIMITS) for i in (3, 0, 7)])
        assert torch.equal(side.input_ids, expected.input_ids)
        assert torch.equal(side.positions, expected.positions)
    assert not torch.equal(batch.student.labels, batch.teacher.labels)


def test_one_tokenizer_gives_one_side_for_both(tiny):
    batch = Collator(RECORDS, tiny.tokenizer("bytes"), None, LIMITS)([1, 2])
    assert batch.teacher is batch.student


TEXTS = st.text(st.sampled_from("abc é東🐋 </s>1234\n"), max_size=30)


@pytest.mark.parametrize("kind", ["exact", "minimum_edit"])
@given(texts=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=4), longest=st.integers(8, 60), bos=st.booleans())
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_pairs_are_of_tokens_of_one_sample(kind, texts, longest, bos, tiny):
    """Whatever is cut off, and where nothing predicts a first token: flat, increasing, in one sample, one to one."""
    records = [Record(prompt, (output,)) for prompt, output in texts]
    teacher, student = tiny.tokenizer("bytes"), tiny.tokenizer("pieces")
    limits = Limits(longest, longest // 2)
    align = aligner(kind, teacher, student)
    collator = Collator(records, student, teacher, limits, align)
    batch = collator(range(len(records)))
    own, other = batch.student, batch.teacher
    sample_of = [np.repeat(np.arange(len(records)), side.lengths) for side in (other, own)]
    pairs = batch.pairs.numpy()
    assert (sample_of[0][pairs[:, 0]] == sample_of[1][pairs[:, 1]]).all()
    assert (np.diff(pairs, axis=0) > 0).all()
    if kind == "exact":
        pieces = token_bytes(teacher, other.labels.tolist()), token_bytes(student, own.labels.tolist())
        for left, right in pairs.tolist():
            # The first piece of a response may have the dummy space that its tokenizer puts there.
            assert pieces[0][left].strip(b" ") == pieces[1][right].strip(b" ")
    else:
        assert pairs.tolist() == list(pairs_alone(collator, own.lengths, other.lengths))


def pairs_alone(collator, student_lengths, teacher_lengths):
    """By a search of each sample's path for other partners; tokens at its beginning that a side leaves out are none."""
    starts = np.zeros(2, int)
    for index, lengths in enumerate(zip(teacher_lengths, student_lengths, strict=True)):
        student, teacher = collator.sample(index)
        skipped = np.array([len(teacher.response), len(student.response)]) - lengths
        path = [pair for pair in (collator.pair(index) - skipped).tolist() if min(pair) >= 0]
        for pair in path:
            if sum(pair[0] == left or pair[1] == right for left, right in path) == 1:
                yield (starts + pair).tolist()
        starts += lengths


def test_a_response_that_is_cut_off_is_aligned_with_the_same_part_of_the_other(tiny):
    record = [Record("Question:", ("one two three four five six seven eight nine ten",))]
    teacher, student = tiny.tokenizer("bytes"), tiny.tokenizer("pieces")
    whole = Collator(record, student, teacher, Limits(500, 40), aligner("minimum_edit", teacher, student))
    cut = Collator(record, student, teacher, Limits(30, 20), aligner("minimum_edit", teacher, student))
    lengths = [(len(c([0]).teacher.labels), len(c([0]).student.labels)) for c in (whole, cut)]
    assert lengths[0] > lengths[1]
    for collator, complete in ((whole, True), (cut, False)):
        batch = collator([0])
        ends = [token_bytes(t, s.labels.tolist()) for t, s in ((teacher, batch.teacher), (student, batch.student))]
        reached = [len(b"".join(p[: i + 1])) for p, i in zip(ends, collator.pair(0)[-1].tolist(), strict=True)]
        assert abs(reached[0] - reached[1]) <= (1 if complete else max(map(len, ends[0] + ends[1])))


def test_lengths_are_those_of_the_batch_and_known_from_then_on(collator):
    batch = collator([3, 0, 7])
    sides = (side.attention_mask.sum(1).tolist() for side in (batch.student, batch.teacher))
    expected = list(zip(*sides, strict=True))
    assert [collator.lengths(index) for index in (3, 0, 7)] == expected
    collator.samples = Recent(size=1)
    collator.tokenized = None
    assert [collator.lengths(index) for index in (3, 0, 7)] == expected


def test_ranks_share_the_micro_batches_of_tokens_of_a_global_batch(collator):
    plan = Plan([len(r.prompt + r.outputs[0]) for r in RECORDS], 1, 12, 4, Budget(2 * 24, collator.lengths))
    for step in range(3):
        for ranks in (1, 2, 4):
            parts = [plan.micro_batches(step, rank, ranks) for rank in range(ranks)]
            assert len({len(part) for part in parts}) == 1
            assert sorted(flat([own for part in parts for own in part])) == sorted(plan.global_batch(step))
            assert all(collator(own).student.input_ids.numel() <= 2 * 24 for part in parts for own in part)


def test_a_record_is_tokenized_once(collator):
    first, again = collator.sample(4), collator.sample(4)
    assert again is first
    assert list(collator.samples.made) == [4]


def test_what_was_used_least_lately_is_made_anew(collator):
    """As many as are to be kept are kept, and no more; the batches are the same."""
    batches = [[0, 1, 2], [2, 3], [0, 4], [2, 3, 1]]
    expected = [collator(batch) for batch in batches]
    collator.samples = Recent(size=3)
    assert all(same(collator(batch), whole) for batch, whole in zip(batches, expected, strict=True))
    assert list(collator.samples.made) == [2, 3, 1]
    kept = collator.sample(3)
    collator.sample(5)
    assert collator.sample(3) is kept
    assert list(collator.samples.made) == [1, 5, 3]


@given(st.lists(st.integers(0, 20), max_size=60), st.integers(1, 10))
def test_what_is_kept_was_asked_for_last(indices, size):
    recent: Recent[int] = Recent(size)
    for index in indices:
        assert recent.get(index, lambda i: i * i) == index * index
        assert len(recent.made) <= size
    lately = list(dict.fromkeys(reversed(indices)))[:size]
    assert list(recent.made) == lately[::-1]


def test_an_epoch_s_order_is_made_once_and_is_numpy_s():
    plan = Plan((1,) * 1000, 3, 8, 2)
    permutation.cache_clear()
    steps = [plan.global_batch(step) for step in range(125)]
    assert permutation.cache_info().misses == 1
    order = np.random.default_rng((3, 0)).permutation(1000).tolist()
    assert [sorted(batch) for batch in steps] == [sorted(order[i : i + 8]) for i in range(0, 1000, 8)]
    plan.global_batch(125)
    assert plan.global_batch(5) == steps[5]  # back in the first epoch, whatever is kept
    assert permutation.cache_info().currsize == 1


class Bytes:
    """A tokenizer that takes `width` bytes of UTF-8 for a token."""

    eos_token_id, bos_token_id = 1, 2

    def __init__(self, width: int) -> None:
        self.width = width

    def encode(self, text: str, **options: bool) -> list[int]:
        raw = text.encode()
        return [3 + int.from_bytes(raw[i : i + self.width], "big") for i in range(0, len(raw), self.width)]


def every_second(teacher: Sequence[int], student: Sequence[int]) -> np.ndarray:
    return np.array([(i, 2 * i) for i in range(min(len(teacher), len(student) // 2))], np.int64).reshape(-1, 2)


@pytest.fixture
def cities(tmp_path) -> Path:
    """Fifty records with blank lines between them."""
    lines = []
    for i in range(50):
        city = ("Paris", "Zürich", "東京", "New York", "Lima")[i % 5]
        answer = f"{city} lies by the sea" + ", and sleeps" * (i % 4) + "."
        record = {"prompt": f"{i}: Where is {city}?" * (i % 3), "output": [answer, "x"] if i % 7 == 0 else answer}
        lines += [json.dumps(record, ensure_ascii=i % 2 == 0), *([""] if i % 10 == 3 else [])]
    (tmp_path / "r.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tmp_path / "r.jsonl"


def contents(batch: Batch) -> bytes:
    """All that a batch holds, its shapes included."""
    found = repr((batch.records, batch.student.lengths, batch.teacher.lengths)).encode()
    for side in (batch.student, batch.teacher):
        for name in ("input_ids", "attention_mask", "positions", "inputs", "labels"):
            tensor = getattr(side, name)
            found += repr(tuple(tensor.shape)).encode() + tensor.numpy().tobytes()
    return found + batch.pairs.numpy().tobytes()


def test_batches_are_what_they_were_when_all_records_were_held_in_memory(cities):
    """The sum is that of the batches of the version that did."""
    records, found = read_records(cities), hashlib.sha256()
    for world_size in (1, 2):
        for rank in range(world_size):
            collator = Collator(records, Bytes(1), Bytes(2), Limits(60, 20, True), every_second)
            steps = Steps(Plan(records.sizes, 7, 8, 2), collator, rank, world_size)
            for batches in load_steps(steps, 0, 20, workers=0, pin_memory=False):
                for batch in batches:
                    found.update(contents(batch))
    assert found.hexdigest() == "a63fbad38cbbe757e7bea1fc74d5ac9b81800e24dd8e1bf8f2ddcf3f730a1b7c"


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_records_that_change_under_a_run_end_it_in_one_line(cities, workers):
    records = read_records(cities)
    steps = Steps(Plan(records.sizes, 7, 8, 2), Collator(records, Bytes(1), None, Limits(60, 20)), 0, 1)
    batches = load_steps(steps, 0, 600, workers, pin_memory=False)
    assert len(next(batches)) == 4
    cities.write_text("")
    steps.collator.samples.made.clear()
    with pytest.raises(UserError) as raised:
        for _ in batches:
            pass
    assert str(raised.value).startswith(f"{cities}: was changed while it was in use")


@pytest.mark.parametrize("shared", [True, False])
def test_workers_and_a_later_start_change_nothing(collator, shared):
    if shared:
        collator.teacher = None
    steps = Steps(Plan(tuple(len(r.prompt) for r in RECORDS), 1, 4, 2), collator, rank=1, world_size=2)
    here = list(load_steps(steps, 0, 7, workers=0, pin_memory=False))
    there = list(load_steps(steps, 0, 7, workers=1, pin_memory=False))
    tail = list(load_steps(steps, 5, 7, workers=0, pin_memory=False))
    assert [len(batches) for batches in here] == [1] * 7
    assert all(same(a, b) for step in zip(here, there, strict=True) for a, b in zip(*step, strict=True))
    assert all(same(a, b) for step in zip(here[5:], tail, strict=True) for a, b in zip(*step, strict=True))
    assert all((batch.teacher is batch.student) == shared for batches in there for batch in batches)


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("size", [1, 3, 5, 13, 20])
def test_evaluation_counts_each_record_once_in_equally_many_rounds(collator, size, ranks):
    by_rank = [list(evaluation_batches(collator, size, rank, ranks)) for rank in range(ranks)]
    counted = Counter(index for part in by_rank for batch, counts in part if counts for index in batch.records)
    assert counted == dict.fromkeys(range(len(RECORDS)), 1)
    assert len({len(part) for part in by_rank}) == 1
    assert all(batch.student.labels.numel() for part in by_rank for batch, _ in part)
