"""What a run reads is known again, and whatever differs in it is noticed."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from dskd.config.load import load_run, override
from dskd.rundir import content
from dskd.rundir.content import as_kept, contents, differences, read_contents, sum_of
from dskd.rundir.layout import RunDirectory


@pytest.fixture
def run(make_run, tmp_path):
    """A run on copies of its models, the teacher behind a link."""
    found = load_run(make_run(tmp_path))
    for role, path in (("student", found.student.path), ("teacher1", found.teacher.path)):
        shutil.copytree(path, tmp_path / role)
    shutil.copytree(tmp_path / "teacher1", tmp_path / "teacher2")
    (tmp_path / "best").symlink_to("teacher1")
    return override(found, [f"student.path={tmp_path / 'student'}", f"teacher.path={tmp_path / 'best'}"])


def changed_by(run, do):
    """Which keys `do` changes, with the words for it."""
    before = contents(run)
    do()
    return {key: words for key, words in differences(before, contents(run)).items() if words is not None}


def rewrite(file: Path, old: bytes, new: bytes) -> None:
    text = file.read_bytes()
    assert old in text
    file.write_bytes(text.replace(old, new, 1))


def test_what_is_as_it_was_is_the_same(run, tmp_path):
    def use():
        (tmp_path / "student" / "eval" / "dev").mkdir(parents=True)
        (tmp_path / "student" / "eval" / "dev" / "results.json").write_text("{}")
        (tmp_path / "student" / "README.md").write_text("about")

    assert changed_by(run, use) == {}
    assert set(contents(run)) == {"data.train", "data.dev", "student.path", "teacher.path"}


@pytest.mark.parametrize(
    ("file", "key", "name"),
    [
        ("train.jsonl", "data.train", "records"),
        ("dev.jsonl", "data.dev", "records"),
        ("student/config.json", "student.path", "config.json"),
        ("student/tokenizer.json", "student.path", "tokenizer.json"),
        ("teacher1/model.safetensors", "teacher.path", "model.safetensors"),
    ],
)
def test_other_bytes_are_noticed(run, tmp_path, file, key, name):
    data = (tmp_path / file).read_bytes()
    other = data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]
    found = changed_by(run, lambda: (tmp_path / file).write_bytes(other))
    assert list(found) == [key]
    assert found[key].endswith(f": {name}")


def test_records_in_another_order_are_noticed(run, tmp_path):
    lines = (tmp_path / "train.jsonl").read_text().splitlines(keepends=True)
    assert list(changed_by(run, lambda: (tmp_path / "train.jsonl").write_text("".join(reversed(lines))))) == [
        "data.train"
    ]


def test_another_model_behind_a_link_is_noticed_and_the_same_is_not(run, tmp_path):
    def lead(name):
        (tmp_path / "best").unlink()
        (tmp_path / "best").symlink_to(name)

    assert changed_by(run, lambda: lead("teacher2")) == {}
    rewrite(tmp_path / "teacher1" / "config.json", b"qwen2", b"qwen3")
    found = changed_by(run, lambda: lead("teacher1"))
    assert found == {
        "teacher.path": f"another content since the last start in {tmp_path}/teacher1 ({tmp_path}/teacher2 at the last "
        "start): config.json"
    }


def test_a_large_file_counts_by_its_size_and_samples_of_all_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(content, "SAMPLE_BYTES", 4)
    file = tmp_path / "model.safetensors"
    data = bytes(range(256)) * 4
    file.write_bytes(data)
    whole, sampled = sum_of(file), sum_of(file, 1023)
    assert whole == sum_of(file, 1024) == hashlib.sha256(data).hexdigest()
    starts = [index * 1020 // 15 for index in range(16)]
    assert starts[0] == 0
    assert starts[-1] + 4 == len(data)
    assert sampled == hashlib.sha256(b"1024" + b"".join(data[s : s + 4] for s in starts)).hexdigest()


def test_what_args_json_keeps_comes_back_and_what_it_lacks_is_nothing(run, tmp_path):
    directory = RunDirectory(tmp_path)
    assert read_contents(directory) == {}
    for text in ("{}", "[", '{"content": 3}', '{"content": {"data.train": 3}}', '{"content": {"a": {"path": 1}}}'):
        directory.args.write_text(text)
        assert read_contents(directory) == {}
    kept = as_kept(contents(run))
    directory.args.write_text(json.dumps({"content": kept}))
    assert read_contents(directory) == contents(run)


def test_a_damaged_sum_is_no_change_of_what_was_read(run, tmp_path):
    directory = RunDirectory(tmp_path)
    text = json.dumps({"content": as_kept(contents(run))})
    known = contents(run)["data.train"].files["records"]
    directory.args.write_text(text.replace(known, "0" + known[1:] if known[0] != "0" else "1" + known[1:]))
    assert read_contents(directory) == {}
