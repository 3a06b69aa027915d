"""Saved models of several runs in one place."""

import json

import pytest

from dskd.config.errors import UserError
from dskd.rundir.collect import collect, runs_among
from dskd.rundir.files import manifest, published, read_manifest


def make(root, name, model, text):
    """A run directory with one saved model."""
    directory = root / "student" / "sft" / name
    with published(directory / model) as folder:
        (folder / "model.safetensors").write_text(text)
        (folder / "config.json").write_text("{}")
    (directory / "run.yaml").write_text("")
    return directory


@pytest.fixture
def runs(tmp_path):
    first = make(tmp_path / "out", "a", "epoch1_step5_loss2.5000", "one")
    second = make(tmp_path / "out", "b", "epoch2_step10_loss2.2500_rougel24.5000", "three")
    (second / "epoch3_step15_loss2.0000").mkdir()  # without a manifest: not complete
    return [first, second]


def test_models_are_copied_and_listed(runs, tmp_path):
    to = tmp_path / "all"
    collect(runs, to)
    first, second = json.loads((to / "index.json").read_text())
    assert (to / first["folder"] / "model.safetensors").read_text() == "one"
    assert (first["step"], first["dev_loss"], first["rougel"], first["size"]) == (5, 2.5, None, 5)
    assert (second["step"], second["dev_loss"], second["rougel"], second["size"]) == (10, 2.25, 24.5, 7)
    assert second["run"] == str(runs[1])
    assert read_manifest(to / second["folder"]) == read_manifest(runs[1] / "epoch2_step10_loss2.2500_rougel24.5000")


def test_what_is_there_is_not_copied_again(runs, tmp_path):
    to = tmp_path / "all"
    before = collect(runs[:1], to)
    inode = (to / before[0].folder / "model.safetensors").stat().st_ino
    assert collect(runs, to)[0] == before[0]
    assert (to / before[0].folder / "model.safetensors").stat().st_ino == inode


def test_a_broken_copy_goes_on_with_the_file_where_it_broke(runs, tmp_path):
    to = tmp_path / "all"
    partial = to / "student" / "sft" / "a" / ".epoch1_step5_loss2.5000.partial"
    partial.mkdir(parents=True)
    (partial / "config.json").write_text("{}")
    (partial / "model.safetensors").write_text("on")
    inode = (partial / "config.json").stat().st_ino
    (model,) = collect(runs[:1], to)
    assert (to / model.folder / "model.safetensors").read_text() == "one"
    assert (to / model.folder / "config.json").stat().st_ino == inode


def test_a_damaged_model_is_refused(runs, tmp_path):
    (runs[0] / "epoch1_step5_loss2.5000" / "model.safetensors").write_text("two")
    with pytest.raises(UserError, match=r"model\.safetensors has another sha256"):
        collect(runs, tmp_path / "all")
    assert not (tmp_path / "all" / "index.json").exists()


def test_two_runs_of_one_name_are_told_apart(runs, tmp_path):
    other = make(tmp_path / "elsewhere", "a", "epoch1_step5_loss2.5000", "four")
    with pytest.raises(UserError, match="another run of the same name"):
        collect([runs[0], other], tmp_path / "all")


def test_what_a_pattern_finds_besides_runs_is_told_apart(runs, tmp_path):
    cache = tmp_path / "out" / "cache"
    cache.mkdir()
    (tmp_path / "out" / "file").touch()
    assert runs_among([cache, *runs, tmp_path / "out" / "file"]) == (runs, [cache, tmp_path / "out" / "file"])
    with pytest.raises(UserError, match=f"^{cache}: no run.yaml"):
        runs_among([cache])


def test_what_holds_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no run\.yaml"):
        collect([tmp_path], tmp_path / "all")


@pytest.mark.parametrize(
    "name", ["../x", "../../../../x", "/abs", "a/../../x", "a\nb", "", ".", "..", "a//b", "a/", "./a"]
)
def test_a_manifest_that_names_what_is_no_file_of_its_folder_is_refused_and_nothing_is_written_elsewhere(
    runs, tmp_path, name
):
    model = runs[0] / "epoch1_step5_loss2.5000"
    files = json.loads((model / "MANIFEST.json").read_text())
    victim = tmp_path / "out" / "x"
    victim.write_text("one")
    files[name] = files["model.safetensors"]
    (model / "MANIFEST.json").write_text(json.dumps(files))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    to = tmp_path / "all" / "models"
    with pytest.raises(UserError) as error:
        collect(runs[:1], to)
    assert len(str(error.value).splitlines()) == 1
    assert "MANIFEST.json names " in str(error.value)
    assert "which is no file of its folder" in str(error.value)
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and not path.is_relative_to(to)}
    assert after == before
    assert not (to / "index.json").exists()


def test_a_manifest_may_name_files_in_folders_of_its_own(runs, tmp_path):
    model = runs[0] / "epoch1_step5_loss2.5000"
    (model / "sub").mkdir()
    (model / "sub" / "..more").write_text("more")
    (model / "MANIFEST.json").unlink()
    (model / "MANIFEST.json").write_text(json.dumps(manifest(model)))
    (collected,) = collect(runs[:1], tmp_path / "all")
    assert (tmp_path / "all" / collected.folder / "sub" / "..more").read_text() == "more"
