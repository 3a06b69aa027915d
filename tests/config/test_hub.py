"""Models of the hub by their names: where huggingface_hub itself has put them, and how they are called."""

from pathlib import Path

import pytest
from huggingface_hub import snapshot_download

from dskd.config.errors import UserError
from dskd.config.hub import cache_folder, find_model, model_name
from dskd.config.load import load_run
from dskd.config.run import check_paths

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A hub cache with one model, as `hf download` leaves it, and an empty working directory."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = tmp_path / "hub" / "models--org--my-model"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(REVISION)
    (folder / "snapshots" / REVISION).mkdir(parents=True)
    (folder / "snapshots" / REVISION / "config.json").write_text("{}")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "hub"


def test_a_name_is_the_snapshot_that_the_hub_s_own_library_finds(cache):
    expected = snapshot_download("org/my-model", local_files_only=True, cache_dir=cache)
    found = find_model(Path("org/my-model"))
    assert found == Path(expected) == cache / "models--org--my-model" / "snapshots" / REVISION
    assert find_model(Path("org/my-model").absolute()) == found
    assert model_name(found) == "my-model"


def test_a_folder_of_that_name_comes_first(cache):
    Path("org/my-model").mkdir(parents=True)
    assert find_model(Path("org/my-model")) == Path("org/my-model")


@pytest.mark.parametrize("name", ["org/none", "org", "../org/my-model", "org/my-model/x", "/org/my-model"])
def test_what_is_not_there_or_no_name_stays_what_it_is(cache, name):
    assert find_model(Path(name)) == Path(name)


@pytest.mark.parametrize("revision", ["", "../../..", "nope", "a/b"])
def test_a_reference_that_leads_nowhere_is_none(cache, revision):
    (cache / "models--org--my-model" / "refs" / "main").write_text(revision)
    assert find_model(Path("org/my-model")) == Path("org/my-model")


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"HF_HUB_CACHE": "/a", "HF_HOME": "/b"}, "/a"),
        ({"HF_HOME": "/b", "XDG_CACHE_HOME": "/c"}, "/b/hub"),
        ({"XDG_CACHE_HOME": "/c"}, "/c/huggingface/hub"),
        ({"HOME": "/d"}, "/d/.cache/huggingface/hub"),
    ],
)
def test_the_cache_is_where_the_environment_says(monkeypatch, variables, expected):
    for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == Path(expected)


def test_a_run_takes_a_model_by_its_name_and_is_called_after_it(cache, make_run, tmp_path):
    run = load_run(make_run(tmp_path), ["student.path=org/my-model", "teacher.adapter=org/my-model"])
    assert run.student.path == run.teacher.adapter == cache / "models--org--my-model" / "snapshots" / REVISION
    assert run.directory.parts[-3:] == ("my-model", "dskd_cma", "default")


def test_a_name_that_is_not_downloaded_is_told_with_how_to_download_it(cache, make_run, tmp_path):
    run = load_run(make_run(tmp_path), ["student.path=org/none"])
    with pytest.raises(UserError) as raised:
        check_paths(run)
    told = f"(nor is org/none in {cache}; to download it: hf download org/none)"
    assert str(raised.value) == f"student.path: no such folder: {tmp_path}/here/org/none {told}"
