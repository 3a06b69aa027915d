"""Batch scripts and container commands for each runtime, compared with golden files (tests/golden/scripts).

A changed script is looked at and then written again: UPDATE_GOLDEN=1 pytest tests/launch/test_scripts.py
"""

import os
import re
import shlex
import sys
from pathlib import Path

import pytest

from dskd.config.cluster import ClusterConfig
from dskd.config.data import DataConfig
from dskd.config.load import load
from dskd.config.methods import DskdCmaConfig
from dskd.config.models import StudentConfig, TeacherConfig
from dskd.config.run import OutputConfig, RunConfig
from dskd.config.training import CheckpointConfig
from dskd.launch.container import rank_command
from dskd.launch.mounts import run_mounts
from dskd.launch.request import Request
from dskd.launch.submit import batch_executor

ROOT = Path(__file__).resolve().parents[2]
PROFILES = sorted((ROOT / "slurm/clusters").glob("*.yaml"))
GOLDEN = ROOT / "tests/golden/scripts"
RUN = Path("/project/outputs/gpt2-base/dskd_cma/default")


@pytest.fixture(autouse=True)
def user_1000(monkeypatch):
    monkeypatch.setattr(os, "getuid", lambda: 1000)
    monkeypatch.setattr(os, "getgid", lambda: 1000)


def run_on(cluster: ClusterConfig) -> RunConfig:
    return RunConfig(
        student=StudentConfig(Path("/project/models/gpt2-base")),
        teacher=TeacherConfig(Path("/project/models/qwen1.5-1.8b")),
        data=DataConfig(Path("/data/dolly/train.jsonl"), Path("/data/dolly/dev.jsonl")),
        method=DskdCmaConfig(),
        checkpoint=CheckpointConfig(scratch_dir=cluster.scratch),
        output=OutputConfig(Path("/project/outputs")),
    )


def requests(cluster: ClusterConfig, count: int) -> list[Request]:
    found = []
    for i in range(count):
        directory = RUN.with_name(f"seed{i}") if count > 1 else RUN
        arguments = ("train", str(directory / "job/run.yaml"))
        command = rank_command(cluster, arguments, run_mounts(run_on(cluster)))
        found.append(Request(directory, directory.name, command, 2, cluster.gpus_per_node or 1, cluster.hours))
    return found


def rendered(cluster: ClusterConfig, count: int = 1, after: tuple[str, ...] = ()) -> str:
    """The batch script and the command of each rank, without what differs between machines."""
    asked = requests(cluster, count)
    folder = RUN / "job/submitit" if count == 1 else RUN.parent / "arrays/1"
    executor = batch_executor(asked, cluster, folder, 4, after)
    text = f"{executor.script(count)}\n# each rank runs\n{' '.join(map(shlex.quote, asked[0].command))}\n"
    return text.replace(sys.executable, "PYTHON")


def golden(name: str, text: str) -> str:
    """What the golden file holds; with UPDATE_GOLDEN it is given this text first."""
    file = GOLDEN / f"{name}.sh"
    if os.environ.get("UPDATE_GOLDEN"):
        file.write_text(text)
    return file.read_text()


@pytest.mark.parametrize("file", PROFILES, ids=lambda file: file.stem)
def test_the_script_of_each_profile(file):
    text = rendered(load(file, ClusterConfig))
    assert text == golden(file.stem, text)


def test_the_script_of_an_array_that_waits_for_other_jobs():
    text = rendered(ClusterConfig(gpus_per_node=1), 20, after=("11", "12"))
    assert text == golden("array", text)


def test_every_runtime_has_an_example():
    runtimes = {load(file, ClusterConfig).container.runtime for file in PROFILES}
    assert runtimes == {"none", "docker", "podman", "apptainer", "pyxis"}


def test_a_run_gets_its_share_of_a_node():
    cluster = ClusterConfig(gpus_per_node=8, cpus_per_node=64, memory_gb=400)
    request = Request(RUN, "x", ("true",), 1, 2, 1.0)
    script = batch_executor([request], cluster, RUN / "job/submitit", None, ()).script(1)
    lines = dict(re.findall(r"#SBATCH --([\w-]+)=(\S+)", script))
    assert (lines["gpus-per-node"], lines["ntasks-per-node"], lines["cpus-per-task"]) == ("2", "2", "8")
    assert lines["mem"] == f"{100 * 1024}M"
