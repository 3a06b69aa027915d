"""Records are read as they are, and what is wrong with them is told by file and line."""

import json
import multiprocessing
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dskd.config.errors import UserError
from dskd.data import records
from dskd.data.records import Record, check_records, read_records

GOOD = '{"prompt": "p", "output": "o"}\n'


@pytest.fixture
def read(tmp_path):
    def read_bytes(content: bytes | str) -> list[Record]:
        file = tmp_path / "r.jsonl"
        file.write_bytes(content.encode() if isinstance(content, str) else content)
        return list(read_records(file))

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
    assert list(read_records(file)) == [Record(p, (o,) if isinstance(o, str) else tuple(o)) for p, o in pairs]


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
        ("[" * 100_000, "JSON that is not read: maximum recursion depth exceeded .*"),
        ('{"prompt": ' * 100_000, "JSON that is not read: maximum recursion depth exceeded .*"),
        (f'{{"id": {"9" * 10_000}}}', r"JSON that is not read: Exceeds the limit \(4300 digits\) .*"),
        (f'{{"{"k" * 10_000}": 1}}', 'field "prompt" is missing; found: k+ ... k+'),
        ('{"a\\nb\\u2028": 1}', r'field "prompt" is missing; found: a\\nb\\u2028'),
        ('{"prompt": "a\0", "output": "o"}', r"broken JSON: Invalid control character at at column \d+"),
        ("\0", "broken JSON: Expecting value at column 1"),
    ],
)
def test_a_bad_record_is_told_by_its_line(read, tmp_path, line, problem):
    with pytest.raises(UserError) as raised:
        read(f"{GOOD}\n{GOOD}{line}\n{GOOD}")  # the blank line counts
    message = str(raised.value)
    assert message.startswith(f"{tmp_path / 'r.jsonl'}:4: ")
    assert re.fullmatch(problem, message.partition(":4: ")[2])
    assert message.isprintable()
    assert len(message) <= 600


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


def test_a_byte_order_mark_is_no_part_of_a_record(read):
    assert read(b"\xef\xbb\xbf" + GOOD.encode() * 2) == [Record("p", ("o",))] * 2
    with pytest.raises(UserError, match=r"r\.jsonl:1: is not UTF-8 text"):
        read(GOOD.encode("utf-16"))


def test_a_line_that_does_not_end_is_not_read_whole(read, monkeypatch):
    monkeypatch.setattr(records, "LONGEST_LINE", 100)
    assert len(read(GOOD * 50)) == 50
    with pytest.raises(UserError, match=r"r\.jsonl:2: is longer than 100 bytes; one record a line is expected$"):
        read(GOOD + json.dumps({"prompt": "p", "output": "o" * 100}))


# Records that are read when they are asked for


@pytest.fixture
def file(tmp_path) -> Path:
    """Twenty records between blank lines, in several alphabets."""
    lines = [
        json.dumps({"prompt": "é" * i, "output": ["東" * (i + 1), "b"]}, ensure_ascii=i % 2 == 0) for i in range(20)
    ]
    (tmp_path / "r.jsonl").write_text("\n" + "\n \n".join(lines) + "\r\n", encoding="utf-8")
    return tmp_path / "r.jsonl"


def plain(file: Path) -> list[Record]:
    """Each line that is not blank, parsed."""
    values = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]
    return [Record(value["prompt"], tuple(value["output"])) for value in values]


def test_a_record_is_read_at_its_place_in_any_order(file):
    found, expected = read_records(file), plain(file)
    assert len(found) == len(expected) == 20
    assert [found[i] for i in reversed(range(20))] == expected[::-1]
    assert found[-1] == expected[-1]
    assert found[3:9:2] == expected[3:9:2]
    assert list(found) == expected
    assert list(found.sizes) == [len(r.prompt) + len(r.outputs[0]) for r in expected]
    with pytest.raises(IndexError):
        found[20]


def indices(found, order, results):
    results.put([found[i] for i in order])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_several_processes_read_at_once(file, method):
    """Forked ones share the open file; each must be at its own place in it."""
    context = multiprocessing.get_context(method)
    found, expected = read_records(file), plain(file)
    orders = [[(7 * i + k) % 20 for i in range(400)] for k in range(3)]
    results = [context.Queue() for _ in orders]
    processes = [context.Process(target=indices, args=(found, *each)) for each in zip(orders, results, strict=True)]
    for process in processes:
        process.start()
    assert [found[i] for i in orders[0]] == [expected[i] for i in orders[0]]
    for order, result, process in zip(orders, results, processes, strict=True):
        assert result.get(timeout=60) == [expected[i] for i in order]
        process.join()


def grown(file: Path) -> None:
    with file.open("a") as out:
        out.write(GOOD)


def rewritten(file: Path) -> None:
    file.write_bytes(file.read_bytes())
    os.utime(file, ns=(1, 1))


@pytest.mark.parametrize("change", [grown, rewritten, lambda file: file.write_bytes(b"")])
def test_a_file_that_was_changed_in_the_meantime_is_told(file, change):
    found = read_records(file)
    assert found[2]
    change(file)
    for index in (0, 19):
        with pytest.raises(UserError) as raised:
            found[index]
        assert str(raised.value) == f"{file}: was changed while it was in use; it must stay as it is until the end"


def test_a_file_that_was_replaced_is_still_the_one_that_was_opened(file, tmp_path):
    found, expected = read_records(file), plain(file)
    (tmp_path / "new").write_text(GOOD)
    (tmp_path / "new").replace(file)
    assert list(found) == expected
    with pytest.raises(UserError, match="was changed while it was in use"):
        pickle.loads(pickle.dumps(found))[0]


def test_a_file_is_closed_with_its_records(file):
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(20):
        assert read_records(file)[0]
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 1


def test_a_million_records_would_take_twelve_megabytes(file):
    found = read_records(file)
    assert found.offsets.itemsize + found.sizes.itemsize == 12
    assert len(pickle.dumps(found)) < 1000


def test_what_is_no_plain_file_is_told(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for read in (read_records, check_records):
        with pytest.raises(UserError, match=f"^{tmp_path}/pipe: is no plain file; one is expected$"):
            read(tmp_path / "pipe")


# Looking before torch is loaded


def test_the_first_thousand_lines_are_checked_at_once(tmp_path):
    file = tmp_path / "r.jsonl"
    for good, caught in ((0, True), (999, True), (1000, False)):
        file.write_text(GOOD * good + '{"prompt": "p"}\n')
        if caught:
            with pytest.raises(UserError, match=f'^{file}:{good + 1}: field "output" is missing; found: prompt$'):
                check_records(file)
        else:
            check_records(file)
    for content, told in (("", True), ("\n\n", True), ("\n" * 2000 + GOOD, False)):
        file.write_text(content)
        if told:
            with pytest.raises(UserError, match=f"^{file}: is empty; at least one record is expected$"):
                check_records(file)
        else:
            check_records(file)
    with pytest.raises(UserError, match=f"^{tmp_path}: cannot be read: Is a directory$"):
        check_records(tmp_path)


def test_records_need_neither_torch_nor_numpy():
    program = "import sys, dskd.data.records; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not {"torch", "numpy"} & set(done.stdout.split())
