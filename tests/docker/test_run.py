"""docker/run composes the container of a job from its run file."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dskd.config.cluster import ClusterConfig, ContainerConfig
from dskd.config.load import load_run
from dskd.launch.request import train_request

RUN = Path(__file__).resolve().parents[2] / "docker" / "run"


def composed(*arguments: object, cwd: Path | None = None) -> list[str]:
    command = [sys.executable, RUN, "--dry-run", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)
    assert (done.returncode, done.stderr) == (0, "")
    return shlex.split(done.stdout)


def mounts(command: list[str]) -> set[tuple[Path, str]]:
    """Each mount as (path, "" or "readonly")."""
    found = set()
    for word in command:
        if word.startswith("--mount="):
            kind, source, target, *mode = word.removeprefix("--mount=").split(",")
            assert kind == "type=bind"
            assert source.removeprefix("source=") == target.removeprefix("target=")
            found.add((Path(source.removeprefix("source=")), ",".join(mode)))
    return found


def test_a_training_gets_what_its_run_file_names(make_run, tiny, tmp_path):
    file = make_run(tmp_path)
    (tmp_path / "lr.yaml").write_text(f"extends: {file.name}\ntrain: {{lr: 1.0e-4}}\n")
    command = composed("--image", "dskd:x", "train", "lr.yaml", "train.max_steps=2", cwd=tmp_path)
    assert command[command.index("dskd:x") :] == ["dskd:x", "train", "lr.yaml", "train.max_steps=2"]
    assert f"--workdir={tmp_path}" in command
    read = [file, tmp_path / "lr.yaml", tmp_path / "train.jsonl", tmp_path / "dev.jsonl", tiny("llama"), tiny("qwen2")]
    assert mounts(command) == {*((path, "readonly") for path in read), (tmp_path / "outputs", "")}
    command = composed("train", file, f"checkpoint.scratch_dir={tmp_path}/scratch")
    assert (tmp_path / "scratch", "") in mounts(command)
    assert mounts(composed("teacher", "cache", file, "--shard", "0/2")) == mounts(composed("train", file))
    assert not (tmp_path / "outputs").exists()  # a dry run makes nothing


def test_a_model_whose_files_are_links_gets_what_they_point_to(make_run, tiny, tmp_path):
    snapshot, blobs = tmp_path / "snapshots" / "main", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in tiny("llama").iterdir():
        (blobs / file.name).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    command = composed("train", make_run(tmp_path, student={"path": snapshot}))
    assert {(snapshot, "readonly"), (blobs, "readonly")} <= mounts(command)


def test_no_right_is_left_that_training_does_not_need(make_run, tmp_path):
    command = composed("--gpus", "none", "train", make_run(tmp_path))
    assert command[:3] == ["docker", "run", "--rm"]
    assert {"--read-only", "--cap-drop=ALL", "--network=none", "--security-opt=no-new-privileges"} <= set(command)
    assert not any(word.startswith(("--gpus", "--ulimit")) for word in command)


@pytest.mark.parametrize(
    ("engine", "gpus", "expected"),
    [
        ("docker", "all", {"--gpus=all", "--ulimit=memlock=-1"}),
        ("docker", "0,2", {'--gpus="device=0,2"', "--ulimit=memlock=-1"}),
        ("podman", "all", {"--device=nvidia.com/gpu=all", "--ulimit=memlock=-1", "--security-opt=label=disable"}),
        ("podman", "0,2", {"--device=nvidia.com/gpu=0", "--device=nvidia.com/gpu=2"}),
    ],
)
def test_gpus(make_run, tmp_path, engine, gpus, expected):
    command = composed("--engine", engine, "--gpus", gpus, "train", make_run(tmp_path))
    assert command[0] == engine
    assert expected <= set(command)


def test_evaluation_gets_its_model_writable_and_its_records(tiny, tmp_path):
    records = tmp_path / "records.jsonl"
    records.touch()
    command = composed("evaluate", tiny("llama"), "--data", records, "--greedy")
    assert mounts(command) == {(tiny("llama"), ""), (records, "readonly")}
    assert mounts(composed("--mount", tmp_path, "evaluate", tiny("llama"), f"--data={records}")) == {
        *((path, "") for path in (tmp_path, tiny("llama"))),
        (records, "readonly"),
    }


def test_evaluation_of_an_adapter_gets_the_model_that_it_belongs_to(tiny, tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tiny("llama"))}))
    assert (tiny("llama"), "readonly") in mounts(composed("evaluate", tmp_path, "--data=none.jsonl"))


def test_evaluation_of_a_model_whose_files_are_links_gets_what_they_point_to(tiny, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    for file in tiny("llama").iterdir():
        (model / file.name).symlink_to(file)
    assert mounts(composed("evaluate", model, "--data=none.jsonl")) == {(model, ""), (tiny("llama"), "readonly")}


def test_an_adapter_whose_base_is_gone_is_told_in_one_line(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "/none"}')
    done = subprocess.run([sys.executable, RUN, "evaluate", tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == f"docker/run: {tmp_path}/adapter_config.json: the adapter's base model is not at /none\n"


def test_a_submitted_container_is_shown_the_same_but_for_the_run_files(make_run, tiny, tmp_path):
    file = make_run(tmp_path, checkpoint={"scratch_dir": str(tmp_path / "scratch")})
    cluster = ClusterConfig(container=ContainerConfig("docker", "image"))
    submitted = mounts(list(train_request(load_run(file), cluster).command))
    assert submitted == mounts(composed("train", file)) - {(file, "readonly")}


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["student.path=/none"], "student.path: no such folder: /none"),
        (["train.lr=fast"], "command line: train.lr: a number is expected"),
        (["output.root=/a,b"], "a path with a comma cannot be mounted"),
    ],
)
def test_a_mistake_is_one_line(make_run, tmp_path, overrides, said):
    command = [sys.executable, RUN, "--dry-run", "train", make_run(tmp_path), *overrides]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert said in line
