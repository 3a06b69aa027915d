import json
from collections.abc import Sequence
from functools import cache
from itertools import pairwise, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support.plain import edit_distance
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dskd.data.alignment import (
    END_OF_TEXT,
    exact_pairs,
    minimum_edit_alignment,
    token_bytes,
    vocabulary_bytes,
)

SHARED = Path(__file__).resolve().parents[2].parent / "shared"
MINED = Path(__file__).resolve().parents[1] / "golden" / "mined_alignment.json"
CORPUS = [
    "The cat sat on the mat.",
    "Hello world, hello there!",
    "naïve café",
    "def f(x):\n    return x + 12",
]
TEXTS = [
    "Hello world",
    " one space",
    "  two",
    "1",
    "x = 12345",
    "naïve 你好世界 🙂!",
    "a\n\n\tb\r\n    c",
    "",
]
any_text = st.text(st.characters(exclude_characters="▁", exclude_categories=["Cs"]))


@cache
def byte_level() -> PreTrainedTokenizerFast:
    """Like GPT-2 and Qwen; EOS is PAD, too."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", pad_token="<|end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    return tokenizer


@cache
def byte_fallback() -> PreTrainedTokenizerFast:
    """Like Llama and Mistral: a dummy space before the text, bytes for unknown characters."""
    control = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    pieces = [*(f"<0x{byte:02X}>" for byte in range(256)), *"▁acehlot ïé", "▁▁", "▁t", "he", "▁the", "ll"]
    merges = [("▁", "▁"), ("▁", "t"), ("h", "e"), ("▁t", "he"), ("l", "l")]
    vocab = {token: index for index, token in enumerate([*control.values(), *pieces])}
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **control)


@cache
def unigram() -> PreTrainedTokenizerFast:
    """Like T5: a Metaspace decoder, no bytes."""
    pieces = ["<unk>", "</s>", "▁", "▁the", "▁c", "at", "c"]
    backend = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


def encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def pieces_of(tokenizer: Any, text: str, eos: bool = False) -> list[bytes]:
    return token_bytes(tokenizer, encode(tokenizer, text) + [tokenizer.eos_token_id] * eos)


def dummy_spaced(text: str) -> bytes:
    return text.encode() if text.startswith(" ") or not text else b" " + text.encode()


@given(any_text)
@example("a\n\n\tb\r\n    c")
@example("  naïve 你好世界 🙂 12345")
def test_pieces_are_the_bytes_of_the_text(text):
    assert b"".join(pieces_of(byte_level(), text)) == text.encode()
    assert b"".join(pieces_of(byte_fallback(), text)) == dummy_spaced(text)


def test_pieces_of_each_kind():
    assert pieces_of(unigram(), "the cat") == [b" the", b" c", b"at"]
    smile = [bytes([byte]) for byte in "🙂".encode()]
    assert pieces_of(byte_level(), "🙂") == smile
    assert pieces_of(byte_fallback(), "🙂") == [b" ", *smile]


def test_control_tokens_and_special_tokens():
    ours, theirs = byte_level(), byte_fallback()
    assert pieces_of(ours, "", eos=True) == pieces_of(theirs, "", eos=True) == [END_OF_TEXT]
    assert token_bytes(theirs, [theirs.bos_token_id, theirs.unk_token_id]) == [b"", b"<unk>"]
    assert pieces_of(ours, "a<|im_start|>b") == [b"a", b"<|im_start|>", b"b"]
    assert not any(END_OF_TEXT in piece for piece in vocabulary_bytes(ours)[: ours.eos_token_id])


def test_added_tokens_are_plain_text():
    copy = Tokenizer.from_str(byte_level().backend_tokenizer.to_str())
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=copy)
    before = token_bytes(tokenizer, encode(tokenizer, "éa"))
    tokenizer.add_tokens([AddedToken("éa", normalized=False)])
    assert b"".join(before) == "éa".encode() != before[0]
    assert token_bytes(tokenizer, encode(tokenizer, "éa")) == ["éa".encode()]


def test_an_id_outside_the_vocabulary_is_refused():
    with pytest.raises(ValueError, match=r"got -100 to 1$"):
        token_bytes(byte_level(), [1, -100])
    with pytest.raises(ValueError, match="must be in"):
        token_bytes(byte_level(), [len(byte_level())])
    assert token_bytes(byte_level(), []) == []


def test_an_unknown_decoder_is_refused():
    backend = Tokenizer(models.WordPiece({"a": 0}, unk_token="a"))
    backend.decoder = decoders.WordPiece()
    with pytest.raises(ValueError, match="WordPiece"):
        vocabulary_bytes(PreTrainedTokenizerFast(tokenizer_object=backend))


@pytest.mark.parametrize("tokenizer", [byte_level, byte_fallback, unigram])
def test_without_a_backend_the_vocabulary_tells(tokenizer):
    known = tokenizer()
    shown = ("get_vocab", "added_tokens_decoder", "bos_token_id", "eos_token_id")
    plain = SimpleNamespace(**{name: getattr(known, name) for name in shown})
    assert vocabulary_bytes(plain) == vocabulary_bytes(known)


@pytest.mark.parametrize("name", ["gpt2", "qwen1.5", "mistral", "tinyllama"])
def test_pieces_of_real_tokenizers(name):
    folder = SHARED / "tokenizers" / name
    if not folder.exists():
        pytest.skip(f"no tokenizer {folder}")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        assert b"".join(pieces_of(tokenizer, text)) in {text.encode(), dummy_spaced(text)}


def test_exact_pairs_of_the_reference():
    if not (SHARED / "reference").exists():
        pytest.skip("no reference values in the shared folder")
    from safetensors.numpy import load_file

    values = load_file(SHARED / "reference" / "dskd_v2_eta.safetensors")
    texts = json.loads((SHARED / "reference" / "dskd_v2_eta.json").read_text())

    def response(side: str, name: str, sample: int) -> list[bytes]:
        labels = values[f"{side}.labels"][sample]
        return [texts[f"{name}_vocab"][label].encode() for label in labels if label != -100]

    rows = []
    for sample in range(len(texts["texts"])):
        pairs = exact_pairs(response("tea", "teacher", sample), response("stu", "student", sample))
        rows += [[sample, *pair] for pair in pairs.tolist()]
    assert rows == values["alignment.pairs"].tolist()


@pytest.mark.parametrize(
    ("teacher", "student", "pairs"),
    [
        # From the reference values.
        (b"dg ea fg c ce".split(), b"d g e a f g c c e".split(), [[3, 6]]),
        # SentencePiece's dummy space, on either side, within a piece and as a piece of its own.
        ([b" Hi", b" you"], [b"Hi", b" you"], [[0, 0], [1, 1]]),
        ([b"1", b"2"], [b" ", b"1", b"2"], [[0, 1], [1, 2]]),
        ([b" Hi", b" you"], [b" Hi", b" you"], [[0, 0], [1, 1]]),
        ([b"", b"  Hi"], [b" ", b"Hi"], []),
        ([b" ", b" ", b" ", b"Hi"], [b" ", b"Hi"], [[0, 0]]),
        ([b"   ", b"Hi"], [b"  ", b"Hi"], [[0, 0], [1, 1]]),
        # Only the same bytes pair, not the same characters.
        (["你".encode(), b"!"], [b"\xe4", b"\xbd\xa0", b"!"], [[1, 2]]),
        ([b"1", b"2", b"3", b" a"], [b"123", b" a"], [[3, 1]]),
        # BOS on one side; EOS with EOS alone.
        ([b"", b"a", END_OF_TEXT], [b"a", END_OF_TEXT], [[1, 0], [2, 1]]),
        ([END_OF_TEXT], [END_OF_TEXT], [[0, 0]]),
        ([b"", END_OF_TEXT], [b""], []),
        # A special token on one side, plain text on the other.
        ([b"a", b"<|im_end|>", b"b"], [b"a", b"<", b"|im", b"_end|>", b"b"], [[0, 0], [2, 4]]),
        # A truncated side, also within a token.
        ([b"a", b"bc", b"d"], [b"a", b"bc"], [[0, 0], [1, 1]]),
        ([b"a", b"b"], [b"a", b"bc", b"d"], [[0, 0]]),
        # Nothing behind a divergence, though bytes and offsets agree there again.
        ([b"a", b"b", b"x", b"c"], [b"a", b"b", b"y", b"c"], [[0, 0], [1, 1]]),
        ([], [b"a"], []),
        ([b" a"], [], []),
        ([], [], []),
    ],
)
def test_exact_pairs(teacher, student, pairs):
    found = exact_pairs(teacher, student)
    assert found.dtype == np.int64
    assert found.shape == (len(pairs), 2)
    assert found.tolist() == pairs


def cut(text: bytes, bounds: Sequence[int]) -> list[bytes]:
    edges = sorted({0, len(text), *(bound for bound in bounds if bound < len(text))})
    return [text[start:end] for start, end in pairwise(edges)]


@given(st.text("abé 你🙂", max_size=20), *[st.lists(st.integers(1, 40), max_size=20)] * 2)
def test_exact_pairs_are_all_equal_spans(text, teacher_bounds, student_bounds):
    teacher, student = cut(text.encode(), teacher_bounds), cut(text.encode(), student_bounds)

    def span(pieces: Sequence[bytes], index: int) -> tuple[int, int]:
        return len(b"".join(pieces[:index])), len(b"".join(pieces[: index + 1]))

    every = product(range(len(teacher)), range(len(student)))
    expected = [[i, j] for i, j in every if span(teacher, i) == span(student, j)]
    assert exact_pairs(teacher, student).tolist() == expected


@given(any_text)
def test_exact_pairs_of_tokenizers_cover_equal_bytes(text):
    teacher, student = pieces_of(byte_fallback(), text, eos=True), pieces_of(byte_level(), text, eos=True)
    pairs = exact_pairs(teacher, student)
    assert pairs[-1].tolist() == [len(teacher) - 1, len(student) - 1]
    assert (np.diff(pairs, axis=0) > 0).all()
    for i, j in pairs.tolist():
        assert teacher[i] in (student[j], b" " + student[j])
        assert b"".join(teacher[:i]).removeprefix(b" ") == b"".join(student[:j]).removeprefix(b" ")


def plain_alignment(teacher: Sequence[str], student: Sequence[str]) -> tuple[int, list[list[int]]]:
    """Cell by cell, the cost and the path: through the diagonal, the student's or the teacher's previous."""
    cells: dict[tuple[int, int], tuple[int, list[list[int]]]] = {(-1, -1): (0, [])}
    for i, j in product(range(len(student)), range(len(teacher))):
        before = [cells[cell] for cell in ((i - 1, j - 1), (i - 1, j), (i, j - 1)) if cell in cells]
        cost, path = min(before, key=lambda cell: cell[0])
        cells[i, j] = cost + edit_distance(student[i], teacher[j]), [*path, [j, i]]
    return cells[len(student) - 1, len(teacher) - 1]


tokens = st.lists(st.text("abc", max_size=4), min_size=1, max_size=12)


@given(tokens, tokens)
@example(["b", "a", "b"], ["a", "b", "a"])  # the student's and the teacher's previous are equally cheap
def test_minimum_edit_alignment_is_the_plain_one(teacher, student):
    alignment = minimum_edit_alignment(teacher, student)
    assert (alignment.cost, alignment.pairs.tolist()) == plain_alignment(teacher, student)
    steps = np.diff(alignment.pairs, axis=0)
    assert alignment.pairs[0].tolist() == [0, 0]
    assert alignment.pairs[-1].tolist() == [len(teacher) - 1, len(student) - 1]
    assert ((steps >= 0) & (steps <= 1)).all()
    assert (steps.sum(axis=1) > 0).all()
    assert sum(edit_distance(student[i], teacher[j]) for j, i in alignment.pairs.tolist()) == alignment.cost
    aligned = alignment.teacher_tokens(len(student))
    assert sorted([j, i] for i, indices in enumerate(aligned) for j in indices) == alignment.pairs.tolist()


@pytest.mark.parametrize("case", json.loads(MINED.read_text()), ids=lambda case: case["text"][:20])
def test_minimum_edit_alignment_of_the_original(case):
    alignment = minimum_edit_alignment(case["teacher_tokens"], case["student_tokens"])
    assert alignment.cost == case["cost"]
    assert alignment.teacher_tokens(len(case["student_tokens"])) == case["student_to_teacher"]


def test_space_markers_do_not_count():
    alignment = minimum_edit_alignment(["▁the", "▁▁", "▁cat"], ["Ġthe", "Ġ", "Ġcat"])
    assert (alignment.cost, alignment.pairs.tolist()) == (0, [[0, 0], [1, 1], [2, 2]])


@pytest.mark.parametrize(("teacher", "student"), [([], []), (["a"], []), ([], ["a", "b"])])
def test_minimum_edit_alignment_of_an_empty_side(teacher, student):
    alignment = minimum_edit_alignment(teacher, student)
    assert (alignment.cost, alignment.pairs.shape) == (0, (0, 2))
    assert alignment.teacher_tokens(len(student)) == [[] for _ in student]
