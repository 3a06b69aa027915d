import logging
import pickle
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.plain import edit_distance
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dskd.data import vocabulary_map as module
from dskd.data.alignment import vocabulary_bytes
from dskd.data.vocabulary_map import build_vocabulary_map, exact_ids, load, load_or_build, save, vocabulary_hash

SHARED = Path(__file__).resolve().parents[2].parent / "shared"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def tokenizer_of(tokens: list[str], decoder: decoders.Decoder, **roles: str) -> PreTrainedTokenizerFast:
    vocab = {token: index for index, token in enumerate([*roles.values(), *tokens])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=backend, **roles)


def byte_level(*tokens: str, eos: str = "<|end|>") -> PreTrainedTokenizerFast:
    """Like GPT-2: ids from 1 on, in the order given."""
    return tokenizer_of(list(tokens), decoders.ByteLevel(), eos_token=eos)


def byte_fallback(*tokens: str) -> PreTrainedTokenizerFast:
    """Like Llama: ids from 2 on, in the order given."""
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    return tokenizer_of(list(tokens), decoders.Sequence(steps), bos_token="<s>", eos_token="</s>")


Targets = dict[str, tuple[str | None, int]]


def targets(teacher: PreTrainedTokenizerFast, student: PreTrainedTokenizerFast) -> Targets:
    """Each teacher token's student token and distance."""
    found = build_vocabulary_map(teacher, student, workers=1)
    assert found.student_ids.dtype == np.int32
    assert found.distance.dtype == np.int16
    return {
        token: (student.convert_ids_to_tokens(int(found.student_ids[index])), int(found.distance[index]))
        if found.student_ids[index] >= 0
        else (None, int(found.distance[index]))
        for token, index in teacher.get_vocab().items()
    }


def test_exact_tokens_are_those_of_the_same_bytes():
    teacher = byte_level("the", "Ġthe", "ĠĠ", "Ċ", "Ã©", "A", "ä½ł")
    student = byte_fallback(*BYTES, "the", "▁the", "▁▁", "é", "A", "你")
    assert targets(teacher, student) == {
        "<|end|>": ("</s>", 0),
        "the": ("the", 0),
        "Ġthe": ("▁the", 0),
        "ĠĠ": ("▁▁", 0),
        "Ċ": ("<0x0A>", 0),
        "Ã©": ("é", 0),
        "A": ("A", 0),  # not its byte piece, although that has the lower id
        "ä½ł": ("你", 0),
    }


def test_several_teacher_tokens_may_have_one_student_token():
    found = targets(byte_fallback("<0x41>", "A"), byte_level("B", "A"))
    assert found == {"<s>": (None, -1), "</s>": ("<|end|>", 0), "<0x41>": ("A", 0), "A": ("A", 0)}


def test_near_tokens_and_ties():
    teacher = byte_level("kitten", "Ġcat", "colour", "ab")
    student = byte_level("xb", "ay", "Ġcats", "bat", "Ġmat", "color", "sitting", "mitten", "abcd")
    assert targets(teacher, student) == {
        "<|end|>": ("<|end|>", 0),
        "kitten": ("mitten", 1),
        "Ġcat": ("Ġcats", 1),  # "Ġmat" is as near and has a higher id
        "colour": ("color", 1),
        "ab": ("xb", 1),  # "ay" likewise
    }


def test_a_byte_piece_is_the_last_of_equally_near_tokens():
    assert targets(byte_level("ab"), byte_fallback(*BYTES, "a", "b"))["ab"] == ("a", 1)


def test_tokens_that_go_nowhere():
    teacher = byte_level("xyz", "end", "abc")
    teacher.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|tool|>"]})
    teacher.add_special_tokens({"pad_token": "<|pad|>"})
    student = byte_level("ab", eos="<eos>")
    student.add_special_tokens({"additional_special_tokens": ["end", "<|tool|>"]})
    found = build_vocabulary_map(teacher, student, workers=1)
    assert targets(teacher, student) == {
        "<|end|>": ("<eos>", 0),
        "xyz": (None, -1),  # nothing in common
        "end": (None, -1),  # a special token of the student is no text
        "abc": ("ab", 1),
        "<|im_start|>": (None, -1),
        "<|tool|>": ("<|tool|>", 0),
        "<|pad|>": (None, -1),
    }
    assert (found.exact, found.near, found.none) == (2, 1, 4)
    assert len(found.student_ids) == len(found.distance) == len(teacher)


def test_eos_need_not_be_marked_as_special():
    teacher = SimpleNamespace(get_vocab=lambda: {"</s>": 0, "a": 1}, added_tokens_decoder={}, eos_token_id=0)
    assert build_vocabulary_map(teacher, byte_level("b", "a"), workers=1).student_ids.tolist() == [0, 2]


pieces = st.lists(st.text("abc", min_size=1, max_size=6), min_size=1, max_size=12, unique=True)


def plain_map(teacher: list[bytes], student: list[bytes]) -> list[tuple[int, int]]:
    """Every pair compared, (student id, distance) of each teacher token; id 0 is EOS on both sides."""
    best = [(0, 0)]
    for piece in teacher[1:]:
        distance, index = min((edit_distance(piece, student[i]), i) for i in range(1, len(student)))
        best.append((index, distance) if distance < max(len(piece), len(student[index])) else (-1, -1))
    return best


@given(pieces, pieces, st.sampled_from([1, 5, 2**25]))
def test_the_search_is_complete(teacher_tokens, student_tokens, block_cells):
    teacher, student = byte_level(*teacher_tokens), byte_level(*student_tokens)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK_CELLS", block_cells)
        found = build_vocabulary_map(teacher, student, workers=1)
    expected = plain_map(vocabulary_bytes(teacher), vocabulary_bytes(student))
    assert list(zip(found.student_ids.tolist(), found.distance.tolist(), strict=True)) == expected


def test_tokens_longer_than_a_byte_counts():
    found = targets(byte_level("a" * 700, "b" * 300), byte_level("a" * 300, "c"))
    assert found == {"<|end|>": ("<|end|>", 0), "a" * 700: ("a" * 300, 400), "b" * 300: (None, -1)}


def test_progress_ends_at_the_total():
    calls: list[tuple[int, int]] = []
    teacher = byte_level("same", "ab", "cd", "abc")
    build_vocabulary_map(teacher, byte_level("same", "a"), lambda done, total: calls.append((done, total)))
    assert calls == [(2, 3), (3, 3)]


def test_the_hash_states_tokens_ids_and_roles():
    hashes = {vocabulary_hash(byte_level(*tokens)) for tokens in (["a", "b"], ["b", "a"], ["a", "c"])}
    grown = byte_level("a", "b")
    assert vocabulary_hash(grown) in hashes
    grown.add_tokens(["new"])
    hashes.add(vocabulary_hash(grown))
    grown.eos_token = "a"
    assert len(hashes | {vocabulary_hash(grown)}) == 5


def test_the_file_is_made_once_and_read_again(tmp_path, monkeypatch):
    teacher, student = byte_level("kitten", "xyz"), byte_level("mitten")
    made = load_or_build(tmp_path / "cache", teacher, student, workers=1)
    monkeypatch.setattr(module, "build_vocabulary_map", None)
    read = load_or_build(tmp_path / "cache", teacher, student)
    np.testing.assert_array_equal(read.student_ids, [0, 1, -1])
    np.testing.assert_array_equal(read.distance, [0, 1, -1])
    assert (read.teacher_hash, read.student_hash) == (made.teacher_hash, made.student_hash)
    assert read.teacher_hash == vocabulary_hash(teacher) != vocabulary_hash(student) == read.student_hash


def changed(path: Path, **arrays: np.ndarray | None) -> None:
    """Write a map's file with other arrays, or without some."""
    with np.load(path) as before:
        content = dict(before) | arrays
    with path.open("wb") as file:
        np.savez(file, **{name: array for name, array in content.items() if array is not None})


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def of_others(path: Path) -> None:
    save(path, build_vocabulary_map(byte_level("theirs"), byte_level("mitten"), workers=1))


USELESS = {
    "an older one": (lambda path: changed(path, checksum=None), "it has no checksum"),
    "another token": (lambda path: changed(path, student_ids=np.array([0, 0, -1], np.int32)), "its checksum is wrong"),
    "another distance": (lambda path: changed(path, distance=np.array([0, 2, -1], np.int16)), "its checksum is wrong"),
    "another type": (lambda path: changed(path, student_ids=np.array([0, 1, -1])), "its checksum is wrong"),
    "another shape": (lambda path: changed(path, distance=np.array([[0, 1, -1]], np.int16)), "its checksum is wrong"),
    "another checksum": (lambda path: changed(path, checksum=np.array("0" * 64)), "its checksum is wrong"),
    "no text for a checksum": (lambda path: changed(path, checksum=np.arange(3)), "it cannot be read: .*"),
    "other vocabularies": (of_others, "it maps other vocabularies"),
    "one hash": (lambda path: changed(path, hashes=np.array(["a"])), "it cannot be read: .*"),
    "no tokens": (lambda path: changed(path, student_ids=None), "it cannot be read: .*"),
    "the beginning": (cut, "it cannot be read: .*"),
    "nothing": (lambda path: path.write_bytes(b""), "it cannot be read: .*"),
    "a pickle": (lambda path: path.write_bytes(pickle.dumps(np.arange(3))), "it cannot be read: .*"),
    "an array alone": (lambda path: np.save(path.open("wb"), np.arange(3)), "it cannot be read: .*"),
}


@pytest.mark.parametrize(("spoil", "reason"), USELESS.values(), ids=USELESS)
def test_a_file_of_anything_else_is_told_and_made_anew(tmp_path, caplog, monkeypatch, spoil, reason):
    monkeypatch.setattr(logging.getLogger("dskd"), "propagate", True)
    teacher, student = byte_level("kitten", "xyz"), byte_level("mitten")
    load_or_build(tmp_path, teacher, student, workers=1)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    spoil(path)
    assert path.read_bytes() != whole
    found = load_or_build(tmp_path, teacher, student, workers=1)
    np.testing.assert_array_equal(found.student_ids, [0, 1, -1])
    np.testing.assert_array_equal(found.distance, [0, 1, -1])
    said = set(caplog.messages)
    assert len(said) == 1
    assert re.fullmatch(f"{path} is not used and made anew: {reason}", said.pop())
    caplog.clear()
    assert list(tmp_path.iterdir()) == [path]
    monkeypatch.setattr(module, "build_vocabulary_map", None)
    load_or_build(tmp_path, teacher, student)
    assert caplog.messages == []


def test_exact_ids_are_those_at_distance_0(tiny):
    teacher, student = tiny.tokenizer("bytes"), tiny.tokenizer("pieces")
    found = build_vocabulary_map(teacher, student, workers=1)
    np.testing.assert_array_equal(exact_ids(teacher, student), np.where(found.distance == 0, found.student_ids, -1))
    assert (exact_ids(teacher, student) >= 0).sum() > 90


def test_several_that_start_at_once_leave_one_whole_file(tmp_path):
    teacher, student = byte_level("kitten", "xyz"), byte_level("mitten")
    with ThreadPoolExecutor(4) as pool:
        maps = list(pool.map(lambda _: load_or_build(tmp_path, teacher, student, workers=1), range(4)))
    (path,) = tmp_path.iterdir()
    for found in (*maps, load(path, (vocabulary_hash(teacher), vocabulary_hash(student)))):
        np.testing.assert_array_equal(found.student_ids, [0, 1, -1])


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "map.npz"
    save(path, build_vocabulary_map(byte_level("a"), byte_level("a"), workers=1))
    whole = path.read_bytes()

    def fail(file, **arrays):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(OSError, match="disk full"):
        save(path, build_vocabulary_map(byte_level("a"), byte_level("b"), workers=1))
    assert path.read_bytes() == whole
    assert list(tmp_path.iterdir()) == [path]


def test_real_vocabularies():
    folders = SHARED / "tokenizers" / "mistral", SHARED / "tokenizers" / "tinyllama"
    if not all(folder.exists() for folder in folders):
        pytest.skip(f"no tokenizers {' and '.join(map(str, folders))}")
    teacher, student = (AutoTokenizer.from_pretrained(folder) for folder in folders)
    found = build_vocabulary_map(teacher, student)
    assert (found.exact, found.near, found.none) == (24212, 7787, 1)
    the, eos = teacher.convert_tokens_to_ids("▁the"), teacher.eos_token_id
    assert student.convert_ids_to_tokens(found.student_ids[[the, eos]].tolist()) == ["▁the", "</s>"]
