"""The environment of a profile may hold secrets: who can read them on the disk, and what shows them."""

import json
import stat
from pathlib import Path

import pytest
from support.cluster import dskd, submit

SECRET = "hf_5ecret0123456789"


def holding_secret(root: Path) -> set[Path]:
    return {path for path in root.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()}


def is_open_to_others(path: Path, root: Path) -> bool:
    """Whether anyone but the owner can come to a file: it lies in no folder that is the owner's alone."""
    folders = [folder for folder in path.parents if folder.is_relative_to(root)]
    return all(stat.S_IMODE(folder.stat().st_mode) & 0o077 for folder in folders)


@pytest.mark.parametrize("count", [1, 2])
def test_only_the_owner_can_read_what_a_submission_writes_of_them(slurm, run, tmp_path, count):
    files = [run.with_name(f"seed{seed}.yaml") for seed in range(count)]
    for file in files:
        file.write_text(f"extends: run.yaml\noutput: {{name: {file.stem}}}\n")
    submit(*files, "--cluster", slurm.profile(environment={"HF_TOKEN": SECRET}))
    outputs = tmp_path / "outputs"
    found = holding_secret(outputs)
    assert {path.name for path in found} >= {"cluster.yaml", "script.sh"}
    assert [path for path in found if is_open_to_others(path, outputs)] == []
    pickles = list(outputs.rglob("*.pkl"))
    assert len(pickles) == count
    assert [path for path in pickles if is_open_to_others(path, outputs)] == []
    assert [path for path in found if path.suffix == ".pkl"] == []


def test_nothing_but_the_script_of_a_dry_run_shows_them(slurm, run, tmp_path):
    profile = slurm.profile(environment={"HF_TOKEN": SECRET})
    assert dskd("submit", run, "--cluster", profile, "--dry-run").count(SECRET) == 1
    pipeline = tmp_path / "pipeline.yaml"
    pipeline.write_text(json.dumps({"stages": {"next": {"run": "run.yaml"}}}))
    (directory,) = submit(run, "--cluster", profile)
    shown = [
        dskd("status", directory),
        dskd("submit", run, "--cluster", profile, code=2),
        dskd("cancel", directory),
        dskd("resume", directory),
        dskd("pipeline", pipeline, "--cluster", profile),
        dskd("settings", "--cluster"),
    ]
    slurm.tell(answers=["Batch job submission failed: Invalid qos specification"])
    shown.append(dskd("submit", run, "--cluster", profile, "output.name=refused", code=2))
    assert SECRET not in "".join(shown)


@pytest.mark.parametrize("value", [f"{SECRET}\n", [SECRET], {"a": SECRET}])
def test_a_mistake_in_one_does_not_show_it(slurm, run, value):
    line = dskd("submit", run, "--cluster", slurm.profile(environment={"HF_TOKEN": value}), code=2)
    assert "environment.HF_TOKEN: text " in line
    assert SECRET not in line
