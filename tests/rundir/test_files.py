"""Files and folders are whole or not there, and what is damaged or lies elsewhere is told."""

import json

import pytest

from dskd.rundir.files import damage, entry, published, read_manifest, write_text

OLD, NEW = "old", "new and longer"


def test_who_reads_a_file_while_it_is_written_anew_reads_the_old_one(tmp_path):
    file = tmp_path / "file"
    write_text(file, OLD)
    with file.open() as reader:
        write_text(file, NEW)
        assert reader.read() == OLD
    assert file.read_text() == NEW
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    file = tmp_path / "file"
    write_text(file, OLD)
    with pytest.raises(UnicodeEncodeError):
        write_text(file, "half a character \ud83d")
    assert file.read_text() == OLD
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("before", [None, OLD])
def test_a_folder_has_its_name_only_when_it_is_whole(tmp_path, before):
    folder = tmp_path / "folder"
    if before is not None:
        with published(folder) as temporary:
            (temporary / "file").write_text(before)
    with published(folder) as temporary:
        (temporary / "file").write_text(NEW)
        (temporary / "below").mkdir()
        (temporary / "below" / "other").write_text("")
        assert folder.exists() == (before is not None)
        assert before is None or (folder / "file").read_text() == before
    assert (folder / "file").read_text() == NEW
    assert {name: entry(folder / name) for name in ("file", "below/other")} == read_manifest(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("before", [None, OLD])
def test_a_folder_that_was_not_filled_leaves_nothing_behind(tmp_path, before):
    folder = tmp_path / "folder"
    if before is not None:
        with published(folder) as temporary:
            (temporary / "file").write_text(before)

    def fill():
        with published(folder) as temporary:
            (temporary / "file").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fill()
    assert [path.name for path in tmp_path.iterdir()] == ([] if before is None else ["folder"])
    assert before is None or (folder / "file").read_text() == before


def test_damage_of_a_file_is_told(tmp_path):
    file = tmp_path / "file"
    file.write_text("abc")
    expected = entry(file)
    assert damage(file, expected) is None
    file.write_text("abd")
    assert damage(file, expected) == "file has another sha256 than its manifest says"
    file.write_text("abcd")
    assert damage(file, expected) == "file has 4 bytes and not 3"
    file.unlink()
    assert damage(file, expected) == "file cannot be read: No such file or directory"


@pytest.mark.parametrize(
    ("name", "inside"),
    [
        ("a", True),
        ("a/b.c", True),
        ("..a", True),
        ("../a", False),
        ("a/../../b", False),
        ("/etc/passwd", False),
        ("a/", False),
        ("./a", False),
        (".", False),
        ("", False),
        ("a\nb", False),
    ],
)
def test_a_manifest_names_files_of_its_own_folder_alone(tmp_path, name, inside):
    listed = {name: {"size": 1, "sha256": "0"}}
    (tmp_path / "MANIFEST.json").write_text(json.dumps(listed))
    if inside:
        assert read_manifest(tmp_path) == listed
    else:
        with pytest.raises(ValueError, match="which is no file of its folder"):
            read_manifest(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", '{"a": 1}', '{"a": {"size": "1", "sha256": "0"}}', '{"a": {"size": 1}}'])
def test_what_is_no_manifest_is_told(tmp_path, text):
    (tmp_path / "MANIFEST.json").write_text(text)
    with pytest.raises(ValueError, match=r"^MANIFEST\.json (cannot be read|does not list files)"):
        read_manifest(tmp_path)
