"""`dskd submit --dry-run` and `dskd status` as typed, with neither cluster nor torch; and wrong input, in one line."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from dskd.rundir.jobs import Job, Jobs

ROOT = Path(__file__).resolve().parents[2]
LOGIN = ROOT / ".venv-login" / "bin" / "dskd"
login = pytest.mark.skipif(not LOGIN.is_file(), reason="no environment without torch: make .venv-login/ready")
BIN = {"PATH": f"{ROOT}/none"}
"""An environment without Slurm."""


@pytest.fixture(scope="module")
def run(make_run, tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("submit"), launch={"processes": None, "nodes": 2})


def dskd(*arguments, program=(sys.executable, "-m", "dskd"), **environment):
    command = [*map(str, program), *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, env=os.environ | environment, timeout=60, check=False
    )


def mistake(*arguments, **environment) -> str:
    done = dskd(*arguments, **environment)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    return line


def test_a_dry_run_shows_script_and_command_and_writes_nothing(run):
    done = dskd("submit", run, "--cluster", "local", "--dry-run", "output.name=dry", **BIN)
    assert (done.returncode, done.stderr) == (0, "")
    assert "#SBATCH --nodes=2\n" in done.stdout
    assert "#SBATCH --gpus-per-node=2\n" in done.stdout
    assert f"-m dskd train {run.parent}/outputs/llama-pieces-untied/dskd_cma/dry/job/run.yaml" in done.stdout
    assert not list(run.parent.glob("outputs/*/*/dry"))


@login
def test_a_dry_run_and_the_status_take_less_than_a_second_of_cpu_where_torch_is_not_installed(run, tmp_path):
    jobs = Jobs.at(tmp_path / "outputs" / "student" / "sft" / "default")
    jobs.write(Job("local", ("true",), 1, 1, 60, 30, 5, id="1"))
    jobs.add_start("1", "node1")
    jobs.end_start(1, "finished", "")
    for arguments in (("submit", run, "--cluster", "local", "--dry-run"), ("status", jobs.directory.path)):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = dskd(*arguments, program=(LOGIN,))
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 0, done.stderr
        assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


def test_an_array_is_limited(run, tmp_path):
    files = []
    for seed in (1, 2, 3):
        files.append(tmp_path / f"seed{seed}.yaml")
        files[-1].write_text(f"extends: {run}\noutput: {{name: seed{seed}}}\n")
    shown = dskd("submit", *files, "--cluster", "local", "--dry-run", "--parallel", "2").stdout
    assert "#SBATCH --array=0-2%2\n" in shown
    assert mistake("submit", files[0], files[0], "--cluster", "local", "--dry-run").startswith("dskd: output.name: two")
    files[1].write_text(f"extends: {run}\noutput: {{name: other}}\nlaunch: {{nodes: 1}}\n")
    assert mistake("submit", *files, "--cluster", "local", "--dry-run").startswith(
        "dskd: launch.nodes: runs submitted together need the same; other and seed1 differ"
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--cluster", "locla"], "--cluster: unknown cluster; allowed: apptainer, docker, local, "),
        (["--cluster", "local", "launch.hours=0.005"], "launch.hours: 0.005 (18 s) is not longer than the profile's "),
        (["--cluster", "local", "launch.processes=3"], "launch.processes: 3 is more than the 2 GPUs of a node"),
        (["--cluster", "local", "launch.nodes=3"], "train.global_batch_size: 8 does not divide into 6 rank(s) x "),
        (["--cluster", "local", "teacher.path=/none"], "teacher.path: no such folder: /none"),
        (["--cluster", "apptainer"], "container.image: no such file: /project/images/dskd.sif"),
        (["--cluster", "plain"], "shared: "),
        (["--cluster", "none.yaml"], "none.yaml: cannot be read: No such file or directory"),
    ],
)
def test_what_cannot_work_is_told_before_the_queue_tells_it(run, arguments, expected):
    assert mistake("submit", run, *arguments, "--dry-run").startswith(f"dskd: {expected}")


@pytest.mark.parametrize(
    ("profile", "expected"),
    [
        ("partitoin: x", "partitoin: unknown key; allowed: "),
        ("hours: soon", "hours: a number is expected, got 'soon'"),
        ("environment: {A: 1}", "environment.A: text is expected"),
        ("container: {runtime: dokcer}", "container.runtime: unknown value 'dokcer'; allowed: "),
        ("container: {runtime: docker}", "container.image: is missing; runtime docker needs one"),
        ("container: {image: x}", "container.image: has no effect with runtime none"),
        ("container: {runtime: docker, image: x, mounts: [a]}", "container.mounts: /path or /host:/inside[:ro] is "),
        ("container: {runtime: docker, image: x}\npython: /x", "python: has no effect with container runtime docker"),
    ],
)
def test_a_mistake_in_a_profile_is_one_line(run, tmp_path, profile, expected):
    file = tmp_path / "mine.yaml"
    file.write_text(profile + "\n")
    assert mistake("submit", run, "--cluster", file, "--dry-run").startswith(f"dskd: {file}: {expected}")


def test_without_slurm_it_says_so(run):
    line = mistake("submit", run, "--cluster", "local", **BIN)
    assert line == "dskd: Slurm is not installed here (no sbatch on PATH): submit from a login node of the cluster"


def test_the_status_of_something_else_is_a_mistake(tmp_path):
    assert mistake("status", tmp_path).startswith(f"dskd: {tmp_path}: no run.yaml: a run directory is ")
