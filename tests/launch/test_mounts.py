"""What a container is shown of a run: everything that it reads, writable only what it writes, and no more."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from dskd.config.cluster import ClusterConfig, ContainerConfig
from dskd.config.errors import UserError
from dskd.config.load import load_run
from dskd.config.pipeline import StageConfig
from dskd.launch.container import passed_variables, rank_command
from dskd.launch.mounts import Mount, base_of, evaluation_mounts, model_mounts, needed
from dskd.launch.request import evaluate_request, train_request
from dskd.launch.task import rank_variables
from dskd.rundir.jobs import Meeting

CONTAINERS = {
    "docker": ContainerConfig("docker", "image"),
    "podman": ContainerConfig("podman", "image"),
    "apptainer": ContainerConfig("apptainer", "image"),
    "pyxis": ContainerConfig("pyxis", "image"),
}
every_runtime = pytest.mark.parametrize("runtime", CONTAINERS)


def in_container(runtime: str, **keys: object) -> ClusterConfig:
    return ClusterConfig(container=CONTAINERS[runtime], **keys)


def mounted(command: tuple[str, ...]) -> dict[str, tuple[str, bool]]:
    """Of each place in a container, where it lies outside and whether it can be written, in each runtime's words."""
    found = {}
    for word in command:
        option, _, value = word.partition("=")
        if option == "--mount":
            kind, source, target, *mode = value.split(",")
            assert kind == "type=bind"
            found[target.removeprefix("target=")] = (source.removeprefix("source="), mode == [])
        elif option in ("--bind", "--container-mounts"):
            for mount in value.split(","):
                source, target, *mode = mount.split(":")
                found[target] = (source, mode == [])
    return found


def hub(folder: Path, model: Path) -> Path:
    """A model as a download leaves it: links to blobs in a folder beside."""
    snapshot, blobs = folder / "snapshots" / "main", folder / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in model.iterdir():
        shutil.copy(file, blobs / file.name)
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    return snapshot


# What is mounted


def test_a_link_to_a_link_shows_both_ends(tmp_path):
    for name in ("model", "blobs", "disk"):
        (tmp_path / name).mkdir()
    (tmp_path / "disk" / "weights").touch()
    (tmp_path / "blobs" / "weights").symlink_to(tmp_path / "disk" / "weights")
    (tmp_path / "model" / "model.safetensors").symlink_to("../blobs/weights")
    (tmp_path / "model" / "again").symlink_to("model.safetensors")
    (tmp_path / "model" / "gone").symlink_to("/nowhere/at/all")
    (tmp_path / "model" / "circle").symlink_to("circle")
    expected = {tmp_path / name for name in ("model", "blobs", "disk")}
    assert {(mount.target, mount.source) for mount in model_mounts(tmp_path / "model")} == {(p, p) for p in expected}


def test_links_out_of_a_folder_that_is_a_link_itself_lead_to_the_same_files_inside(tmp_path):
    """A relative link starts at the folder's name in the container, which is not where the folder lies outside."""
    for name in ("cache/snapshots/main", "cache/blobs", "a/b"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "cache/blobs/weights").touch()
    (tmp_path / "cache/snapshots/main/model.safetensors").symlink_to("../../blobs/weights")
    (tmp_path / "a/b/model").symlink_to(tmp_path / "cache/snapshots/main")
    found = {mount.target: mount.source for mount in model_mounts(tmp_path / "a/b/model")}
    assert found == {tmp_path / "a/b/model": tmp_path / "a/b/model", tmp_path / "a/blobs": tmp_path / "cache/blobs"}


def test_the_base_of_an_adapter_is_found_or_told_as_missing(tmp_path):
    assert base_of(tmp_path) is None
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({"base_model_name_or_path": str(tmp_path)}))
    assert base_of(tmp_path) == tmp_path
    for base in ("/none", None, 5):
        file.write_text(json.dumps({"base_model_name_or_path": base}))
        with pytest.raises(UserError, match=f"{file}: the adapter's base model is not at {base}"):
            base_of(tmp_path)


@pytest.mark.parametrize("path", ["/a,b", "/a\nb", "/"])
def test_a_path_that_would_become_another_mount_is_refused(path):
    with pytest.raises(UserError, match="cannot be mounted"):
        Mount.of(Path(path))


@pytest.mark.parametrize("runtime", ["apptainer", "pyxis"])
def test_a_colon_is_refused_where_it_would_begin_another_part_of_a_mount(runtime):
    mount = Mount.of(Path("/a:/etc"))
    with pytest.raises(UserError, match="/a:/etc: a path with a colon cannot be mounted by this container runtime"):
        rank_command(in_container(runtime), ("train",), [mount])
    assert mounted(rank_command(in_container("docker"), ("train",), [mount])) == {"/a:/etc": ("/a:/etc", False)}


@pytest.mark.parametrize(
    ("read", "write", "given", "expected"),
    [
        (
            ["/p/models/a", "/data"],
            ["/p/out"],
            ["/p", "/host:/data:ro"],
            {"/p": ("/p", True), "/data": ("/host", False)},
        ),
        (["/a/b", "/a/b/c"], ["/a/b/out"], [], {"/a/b": ("/a/b", False), "/a/b/out": ("/a/b/out", True)}),
        (["/p/models"], ["/p/out"], ["/p:/p:ro"], {"/p": ("/p", False), "/p/out": ("/p/out", True)}),
        (["/out/x"], ["/out"], [], {"/out": ("/out", True), "/out/x": ("/out/x", False)}),
        (["/out"], ["/out"], [], {"/out": ("/out", True)}),
        (["/ab"], ["/a"], [], {"/a": ("/a", True), "/ab": ("/ab", False)}),
    ],
)
def test_what_another_mount_shows_already_is_not_mounted_again(read, write, given, expected):
    own = [*(Mount.of(Path(path)) for path in read), *(Mount.of(Path(path), writable=True) for path in write)]
    found = needed(own, [Mount.parse(text) for text in given])
    assert {str(m.target): (str(m.source), m.writable) for m in found} == expected
    assert found == sorted(found)  # outer ones first, which inner ones lie over


# What a rank is given


@every_runtime
def test_a_submitted_training_sees_what_its_models_link_to(make_run, tiny, tmp_path, runtime):
    student = hub(tmp_path / "student", tiny("llama"))
    run = load_run(make_run(tmp_path, student={"path": student}), ["data.cache_dir=cache"])
    found = mounted(train_request(run, in_container(runtime, scratch=Path("/scratch"))).command)
    read = [student, tmp_path / "student" / "blobs", tiny("qwen2"), tmp_path / "train.jsonl", tmp_path / "dev.jsonl"]
    write = [tmp_path / "outputs", Path("/scratch"), Path("cache").absolute()]
    expected = {str(path): (str(path), False) for path in read} | {str(path): (str(path), True) for path in write}
    assert found == expected


@every_runtime
def test_a_submitted_evaluation_of_an_adapter_sees_its_base_model_and_writes_nothing_but_its_results(
    tiny, tmp_path, runtime
):
    base, model, data = hub(tmp_path / "base", tiny("llama")), tmp_path / "run" / "best", tmp_path / "valid.jsonl"
    data.touch()
    output = tmp_path / "run" / "eval" / "valid" / "seed7"
    stage = StageConfig(evaluate="x", data=("y",))
    request = evaluate_request(model, base, data, [7], output, stage, in_container(runtime))
    found = mounted(request.command)
    read = [base, tmp_path / "base" / "blobs", model, data]
    assert found == {str(p): (str(p), False) for p in read} | {str(output): (str(output), True)}


def test_what_a_model_links_to_must_be_on_storage_that_the_nodes_share(make_run, tiny, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    for file in tiny("llama").iterdir():
        (model / file.name).symlink_to(file)
    run = load_run(make_run(tmp_path, student={"path": model}, method={"kind": "sft"}, teacher=None))
    with pytest.raises(UserError, match=f"shared: {tiny('llama')} is not in a folder that all nodes share"):
        train_request(run, ClusterConfig(shared=(tmp_path,)))


@pytest.mark.parametrize("engine", ["docker", "podman"])
def test_a_submitted_container_may_do_no_more_than_one_of_docker_run_but_for_the_network(engine, monkeypatch):
    monkeypatch.setattr(os, "getuid", lambda: 1234)
    monkeypatch.setattr(os, "getgid", lambda: 100)
    command = rank_command(in_container(engine), ("train", "x"), [Mount.of(Path("/out"), writable=True)])
    assert command[:5] == ("sh", "-c", 'mkdir -p /out || exit\nexec "$@"', "dskd", engine)
    strict = (
        "--read-only",
        "--cap-drop=ALL",
        "--security-opt=no-new-privileges",
        "--tmpfs=/tmp:exec",
        "--user=1234:100",
    )
    assert {*strict, "--network=host", "--ipc=host"} <= set(command)
    assert "--init" not in command
    assert not any(word.startswith(("--privileged", "--cap-add", "--volume")) for word in command)
    assert command[command.index("image") + 1 :] == ("train", "x")
    assert ("--userns=keep-id" in command) == (engine == "podman")


def test_of_two_folders_for_tmp_the_one_that_was_asked_for_counts():
    """docker and podman refuse two mounts at one place."""
    tmp = Mount.of(Path("/tmp"), writable=True)
    assert not any(word.startswith("--tmpfs") for word in rank_command(in_container("docker"), ("train",), [tmp]))
    for asked, expected in (("/tmp:size=1g", ["/tmp:size=1g"]), ("/tmpdir", ["/tmp:exec", "/tmpdir"])):
        container = ContainerConfig("podman", "image", arguments=(f"--tmpfs={asked}",))
        command = rank_command(ClusterConfig(container=container), ("train",), [])
        assert [word.removeprefix("--tmpfs=") for word in command if word.startswith("--tmpfs")] == expected


def test_apptainer_and_pyxis_show_neither_home_nor_the_folder_of_the_submission():
    apptainer = rank_command(in_container("apptainer"), ("train",), [])[2]
    assert "exec apptainer exec --cleanenv --no-home --no-mount=home,cwd " in apptainer
    assert "--no-container-mount-home" in rank_command(in_container("pyxis"), ("train",), [])[2]


@every_runtime
def test_a_folder_that_is_not_there_yet_is_made_on_the_node(tmp_path, runtime):
    """Else docker would not start, or would make it as root. The runtime itself is a stand-in here."""
    folder = tmp_path / "a b" / "$(touch x)"
    command = rank_command(in_container(runtime), ("train",), [Mount.of(folder, writable=True)])
    (tmp_path / "bin").mkdir()
    for name in ("docker", "podman", "apptainer", "srun"):
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n[ -d '{folder}' ] && touch {tmp_path}/started\n")
        (tmp_path / "bin" / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}/bin:{os.defpath}", "SLURMD_NODENAME": "node1"}
    code = os.spawnvpe(os.P_WAIT, "sh", list(command), environment)
    assert (code, (tmp_path / "started").exists(), folder.is_dir()) == (0, True, True)


def test_a_container_gets_every_variable_that_a_task_sets_and_each_once():
    cluster = ClusterConfig(gpus_per_node=1, environment={"OMP_NUM_THREADS": "1", "RANK": "0", "NCCL_DEBUG": "WARN"})
    names = passed_variables(cluster)
    assert len(set(names)) == len(names)
    place = SimpleNamespace(num_tasks=2, num_nodes=1, global_rank=1, local_rank=1, hostnames=["node1"])
    assert {*rank_variables(place, Meeting(1, "secret")), "CUDA_VISIBLE_DEVICES", "NCCL_DEBUG"} == set(names)


def test_an_evaluation_that_writes_into_its_model_gets_it_writable(tmp_path):
    assert needed(evaluation_mounts(tmp_path, [], tmp_path, None)) == [Mount.of(tmp_path, writable=True)]
