"""A rank in a real container: docker on the nodes of the local cluster; its image is this machine, read-only."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.cluster import ROOT, dskd, steps, submit, wait_for, wait_until

DOCKER = Path("/usr/bin/docker")
ENGINE = ["--bridge=none", "--iptables=false", "--ip6tables=false", "--ip-masq=false", "--ip-forward=false"]


@pytest.fixture(scope="module")
def docker(tmp_path_factory) -> Iterator[Path]:
    """A docker engine of its own; the folder that holds it."""
    if not (DOCKER.exists() and shutil.which("dockerd")):
        pytest.skip("no docker engine on this machine (apt-get install docker.io)")
    folder = tmp_path_factory.mktemp("docker")
    socket = f"unix://{folder}/socket"
    roots = [f"--data-root={folder}/data", f"--exec-root={folder}/exec", f"--pidfile={folder}/pid"]
    with pytest.MonkeyPatch.context() as patch, (folder / "log").open("w") as log:
        patch.setenv("DOCKER_HOST", socket)
        patch.setenv("PATH", f"{DOCKER.parent}:{os.environ['PATH']}")
        engine = subprocess.Popen(["dockerd", *ENGINE, *roots, "-H", socket], stdout=log, stderr=log)
        try:
            wait_until(lambda: subprocess.run([DOCKER, "info"], capture_output=True).returncode == 0, 30)
            empty = subprocess.run(["tar", "--create", "--files-from=/dev/null"], capture_output=True, check=True)
            subprocess.run([DOCKER, "import", "-", "host"], input=empty.stdout, capture_output=True, check=True)
            yield folder
        finally:
            engine.terminate()
            engine.wait(60)
            subprocess.run(["umount", "--quiet", f"{folder}/exec/netns/default"])  # the engine leaves it mounted


@pytest.fixture(scope="module")
def in_docker(slurm, docker, profile):
    """A profile whose image is this machine, read-only."""
    needed = [Path(p).resolve() for p in (sys.prefix, sys.base_prefix, ROOT)]
    system = map(Path, ("/usr", "/lib", "/lib64", "/bin", "/etc/passwd", "/etc/ld.so.cache"))
    folders = sorted({*needed, *(folder for folder in system if folder.exists())})
    hosts = [f"--add-host=node{k}:127.0.0.1" for k in (1, 2, 3, 4)]  # docker's own /etc/hosts hides the nodes' one
    container = {
        "runtime": "docker",
        "image": "host",
        "mounts": [f"{folder}:{folder}:ro" for folder in folders],
        "arguments": ["--tmpfs=/tmp", "--init", "--env=PYTHONPATH", "--env=HOME=/tmp", "--read-only", *hosts],
        "command": [sys.executable, "-m", "dskd"],
    }
    return profile(container=container, gpus_per_node=0)


def test_a_run_in_containers_stops_when_asked_and_finishes(in_docker, make_run, tmp_path_factory):
    run = make_run(
        tmp_path_factory.mktemp("container"),
        method={"kind": "sft"},
        train={"epochs": 16, "micro_batch_size": 1},
        launch={"processes": 1, "nodes": 2},
    )
    (directory,) = submit(run, "--cluster", in_docker)
    wait_for(directory, "running", step=3)
    names = subprocess.run([DOCKER, "ps", "--quiet"], capture_output=True, text=True, check=True)
    assert len(names.stdout.split()) == 2
    dskd("cancel", directory)
    stopped = wait_for(directory, "cancelled")
    assert 3 <= stopped.state_step < 80
    assert not subprocess.run([DOCKER, "ps", "--quiet"], capture_output=True, check=True).stdout
    dskd("resume", directory)
    wait_for(directory, "finished")
    assert steps(directory) == list(range(1, 81))
