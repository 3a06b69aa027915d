"""Records are read as they are, and what is wrong with them is told by file and line."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dskd.config.errors import UserError
from dskd.data.records import Record, read_records

GOOD = '{"prompt": "p", "output": "o"}\n'


@pytest.fixture
def read(tmp_path):
    def read_bytes(content: bytes | str) -> list[Record]:
        file = tmp_path / "r.jsonl"
        file.write_bytes(content.encode() if isinstance(content, str) else content)
        return read_records(file)

    return read_bytes


def test_text_or_list_of_texts_and_blank_lines_between(read):
    assert read(GOOD + "\n  \n" + '{"prompt": "", "output": [" a\\n", "b"], "id": 7}') == [
        Record("p", ("o",)),
        Record("", (" a\n", "b")),
    ]


def test_windows_line_ends_and_line_separators_inside_text(read):
    separated = '{"prompt": "a\u2028b\u0085c", "output": "o"}'
    assert read(f"{separated}\r\n{GOOD}") == [Record("a\u2028b\u0085c", ("o",)), Record("p", ("o",))]


texts = st.text(st.characters(codec="utf-8"))
answers = texts.filter(str.strip)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(texts, answers | st.lists(answers, min_size=1, max_size=3)), min_size=1), st.booleans())
def test_what_json_writes_is_read_back(tmp_path_factory, pairs, ascii_):
    file = tmp_path_factory.mktemp("records") / "r.jsonl"
    lines = [json.dumps({"prompt": p, "output": o}, ensure_ascii=ascii_) for p, o in pairs]
    file.write_bytes("\n".join(lines).encode())
    assert read_records(file) == [Record(p, (o,) if isinstance(o, str) else tuple(o)) for p, o in pairs]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"prompt": "p", "output": "o"', r"broken JSON: Expecting ',' delimiter at column \d+"),
        ("prompt: p", "broken JSON: Expecting value at column 1"),
        (GOOD.strip() * 2, "broken JSON: Extra data at column 31"),
        ('["p", "o"]', 'an object {"prompt": ..., "output": ...} is expected'),
        ("null", "an object .* is expected"),
        ('{"prompt": "p"}', 'field "output" is missing; found: prompt'),
        ('{"output": "o", "id": 3}', 'field "prompt" is missing; found: output, id'),
        ("{}", 'field "prompt" is missing; found: nothing'),
        ('{"prompt": 1, "output": "o"}', '"prompt" must be text'),
        ('{"prompt": null, "output": "o"}', '"prompt" must be text'),
        ('{"prompt": "p", "output": 1}', '"output" must be text or a list of texts'),
        ('{"prompt": "p", "output": null}', '"output" must be text or a list of texts'),
        ('{"prompt": "p", "output": {"text": "o"}}', '"output" must be text or a list of texts'),
        ('{"prompt": "p", "output": ["o", 1]}', '"output" must be text or a list of texts'),
        ('{"prompt": "p", "output": ""}', '"output" is empty; .*'),
        ('{"prompt": "p", "output": " \\n"}', '"output" is empty; .*'),
        ('{"prompt": "p", "output": []}', '"output" is empty; .*'),
        ('{"prompt": "p", "output": ["o", ""]}', '"output" is empty; .*'),
    ],
)
def test_a_bad_record_is_told_by_its_line(read, tmp_path, line, problem):
    with pytest.raises(UserError) as raised:
        read(f"{GOOD}\n{GOOD}{line}\n{GOOD}")  # the blank line counts
    message = str(raised.value)
    assert message.startswith(f"{tmp_path / 'r.jsonl'}:4: ")
    assert re.fullmatch(problem, message.partition(":4: ")[2])
    assert len(message.splitlines()) == 1


def test_a_line_that_was_cut_off_is_told_by_its_column(read):
    with pytest.raises(UserError, match=r"at column 30$"):
        read('{"prompt": "p", "output": "o"\n')


@pytest.mark.parametrize("content", ["", "\n", " \n\t\n\r\n"])
def test_a_file_without_records(read, tmp_path, content):
    with pytest.raises(UserError, match=f"^{tmp_path}/r.jsonl: is empty; at least one record is expected$"):
        read(content)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match=f"^{tmp_path}/none.jsonl: cannot be read: No such file or directory$"):
        read_records(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match=f"^{tmp_path}: cannot be read: Is a directory$"):
        read_records(tmp_path)


def test_text_that_is_not_utf8(read, tmp_path):
    with pytest.raises(UserError, match=f"^{tmp_path}/r.jsonl:2: is not UTF-8 text"):
        read(GOOD.encode() + '{"prompt": "Zürich", "output": "o"}'.encode("latin-1"))


def test_the_place_of_what_is_not_utf8_in_a_long_file(read):
    content = GOOD.encode() * 1000 + b'{"prompt": "\xff"}'
    with pytest.raises(UserError) as raised:
        read(content)
    assert re.search(rf":1001:|byte {content.index(255)}\b", str(raised.value))


@pytest.mark.parametrize("field", ["prompt", "output"])
def test_half_a_character_is_told_by_its_line(read, field):
    with pytest.raises(UserError, match=r"r\.jsonl:2: "):
        read(GOOD + json.dumps({"prompt": "p", "output": "o"} | {field: "cut off \ud83d"}))
