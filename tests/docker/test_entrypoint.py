"""What the entry point reads out of a command and a driver; test_image.py makes each check fire in a container."""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

spec = spec_from_file_location("entrypoint", Path(__file__).resolve().parents[2] / "docker" / "entrypoint.py")
entrypoint = module_from_spec(spec)
spec.loader.exec_module(entrypoint)
Driver, Job = entrypoint.Driver, entrypoint.Job


def test_what_a_training_asks_for(make_run, tmp_path):
    file = make_run(tmp_path, launch={"processes": 3}, data={"workers": 2})
    output = tmp_path / "outputs" / "llama-pieces-untied" / "dskd_cma" / "x"
    assert entrypoint.job_of(["train", str(file), "output.name=x", "--force"]) == Job(3, 2, output)
    assert entrypoint.job_of(["teacher", "cache", str(file), "--shard", "0/4", "output.name=x"]) == Job(3, 2, output)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["evaluate", "/m", "--data", "d", "--processes", "2"], Job(2, 0, Path("/m"))),
        (["evaluate", "/m", "--data", "d", "--output=/o"], Job(None, 0, Path("/o"))),
        (["train", "/none.yaml"], None),
        (["train"], None),
        (["resume", "/none"], None),
        (["evaluate", "/m", "--processes", "two"], None),
        (["settings"], None),
        ([], None),
    ],
)
def test_other_commands(arguments, expected):
    assert entrypoint.job_of(arguments) == expected


@pytest.mark.parametrize(
    ("processes", "driver", "placed", "cuda", "said"),
    [
        (None, None, False, "13.0", "no GPU is visible"),
        (None, Driver(0, (13, 0)), False, "13.0", "no GPU is visible"),
        (None, Driver(2, (12, 9)), False, "13.0", "it runs CUDA 12.9, and this image needs CUDA 13.0"),
        (4, Driver(2, (13, 0)), False, "13.0", "launch.processes: 4, but 2 GPU(s)"),
        (None, Driver(2, (13, 0)), False, "13.0", None),
        (2, Driver(4, (13, 2)), False, "13.0", None),
        (2, None, False, "", None),
        (None, None, True, "", None),
        (8, Driver(1, (13, 0)), True, "13.0", None),
    ],
)
def test_gpus(processes, driver, placed, cuda, said):
    found = list(entrypoint.gpu_problems(Job(processes, 1, Path("/")), driver, placed, cuda))
    assert len(found) == (said is not None)
    assert all(said in line for line in found)
