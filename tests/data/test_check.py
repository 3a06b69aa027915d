"""What `dskd data check` counts and warns of, beside counts by hand."""

import json
import sys
from itertools import pairwise

import pytest
from support.tiny import varied_records, write_records
from tokenizers.processors import TemplateProcessing

from dskd.cli import main
from dskd.data.check import EDGES, Coverage, Side, coverage, example, histogram, prompt_key, repeated, spread, warnings
from dskd.data.records import Record
from dskd.data.tokenization import Limits, tokenize_response

CHAT = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
PLAIN = ["Question: Where is Lima?"] * 3


@pytest.fixture
def side(tiny):
    def make(name="student", tokenizer="pieces", template=None, special=()):
        made = tiny.tokenizer(tokenizer)
        made.chat_template = template
        made.add_special_tokens({"additional_special_tokens": list(special)})
        return Side(name, made)

    return make


def test_bins_end_at_their_edges():
    assert histogram([1, EDGES[0], EDGES[0] + 1, EDGES[-1], EDGES[-1] + 1]) == [2, 1, *[0] * (len(EDGES) - 3), 1, 1]


@pytest.mark.parametrize(("count", "most"), [(1, 5), (5, 5), (6, 5), (100, 7)])
def test_records_are_looked_at_evenly(count, most):
    found = list(spread(count, most))
    assert 0 < len(found) <= min(count, most)
    assert len({after - before for before, after in pairwise(found)}) <= 1


def test_prompts_that_differ_in_spaces_and_capitals_are_one():
    keys = [prompt_key(prompt) for prompt in ("Where is\n Lima?", "where is lima? ", "Where is Lima")]
    assert repeated(keys) == [1]
    assert repeated(keys[1:], keys[:1]) == [0]
    assert repeated(keys[2:], keys[:2]) == []


def test_coverage_counts_tokens_of_the_same_bytes(tiny):
    own, other = tiny.tokenizer("bytes"), tiny.tokenizer("pieces")
    records = [Record("p", (str(answer),)) for answer in ("Paris lies by the sea.", "東京")]
    lengths = [sum(len(tokenize_response(t, r.outputs[0])) for r in records) for t in (own, other)]
    found = coverage(records, own, other)
    assert (found.student, found.teacher) == tuple(lengths)
    assert 0 < found.pairs <= min(lengths)
    assert coverage(records, own, own) == Coverage(lengths[0], lengths[0], lengths[0])


def test_an_example_shows_what_has_a_label(side):
    one = side(tokenizer="bytes")
    counted, prompt, response = example(Record("Where is Lima?", ("In Lima.",)), one, Limits(60, 30))
    assert prompt == "Where is Lima?"
    labels = [one.tokenizer.decode([index]) for index in tokenize_response(one.tokenizer, "In Lima.")]
    assert response == f"|{'|'.join(labels)}|<|endoftext|>|"
    assert f"{len(labels) + 1} response tokens with a label" in counted
    _, _, alone = example(Record("", ("In Lima.",)), one, Limits(60, 30))
    assert not alone.startswith("|")  # nothing predicts the first token


@pytest.mark.parametrize(
    ("student", "teacher", "prompts", "bos", "told"),
    [
        ({}, {}, PLAIN, False, []),
        ({}, {"template": CHAT}, PLAIN, False, ["the teacher has a chat template, whose prompts begin with '[user]'"]),
        ({"template": CHAT}, None, ["[user] a<end>[assistant] "], False, ["ends an answer with '<end>'"]),
        ({"template": CHAT.replace("<end>", "</s>")}, None, ["[user] a</s>[assistant] "], False, []),
        (
            {"template": CHAT.replace("<end>", "</s>")},
            {"template": CHAT.replace("<end>", " </s>")},
            ["[user] a</s>[assistant] "],
            False,
            ["the chat templates of student and teacher differ"],
        ),
        (
            {"special": ["<|user|>"]},
            {},
            ["<|user|>a", "b"],
            False,
            ["'<|user|>', in 1 prompts, is one token to the student"],
        ),
        ({}, {"tokenizer": "bytes"}, ["<s>a"], False, ["'<s>', in 1 prompts, is one token to the student"]),
        ({}, {}, ["<s>a", "b"], True, ["data.bos=true puts '<s>' before 1 prompts"] * 2),
    ],
)
def test_what_is_warned_of(side, student, teacher, prompts, bos, told):
    other = None if teacher is None else side("teacher", **teacher)
    found = warnings(side("student", **student), other, prompts, bos)
    assert len(found) == len(told), found
    for warning, words in zip(found, told, strict=True):
        assert words in warning


def test_a_tokenizer_that_puts_bos_before_a_text(side):
    one = side("teacher")
    one.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    assert warnings(side(), one, PLAIN, False) == [
        "the teacher's tokenizer usually puts '<s>' before a text, and data.bos is false"
    ]
    assert warnings(side(), one, PLAIN, True) == []


def test_the_verb_tells_all_of_it(make_run, tmp_path, monkeypatch, capsys):
    run = make_run(tmp_path)
    train = varied_records(40)
    write_records(tmp_path / "train.jsonl", [*train, train[3]])
    write_records(tmp_path / "dev.jsonl", [train[5], *varied_records(10, start=100)])
    monkeypatch.setattr(sys, "argv", ["dskd", "data", "check", str(run), "data.max_length=34"])
    with pytest.raises(SystemExit) as end:
        main()
    out = capsys.readouterr().out
    assert not end.value.code
    assert f"data.train: 41 records of {tmp_path / 'train.jsonl'}; 1 records (40) with a prompt" in out
    assert "data.dev: 1 records (0) with a prompt that is in data.train too" in out
    assert "of the teacher's stand for the same bytes" in out
    assert out.count("response tokens with a label") == 6
    assert json.dumps(train[0]["prompt"])[1:-1].split("\\n")[0] in out
    assert not (tmp_path / "outputs").exists()
