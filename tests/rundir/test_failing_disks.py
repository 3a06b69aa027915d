"""Disk calls that fail for a moment are made again; those that keep failing are told in one line.

The calls really fail: a small library is loaded before libc (see `soak.harm`), in a process of its own.
"""

import os
import subprocess
import sys

import pytest
from soak.harm import FAULT, FOR_GOOD, DiskFault, arm, build_shim

# Writes a file, then a folder that is published, and appends a line; what cannot be written is told as a user sees it.
PROGRAM = """
import sys
from pathlib import Path
from soak.harm import arm_this_process
from dskd.config.errors import UserError
from dskd.rundir.files import append_json, as_user_error, persistently, published, write_text
folder = Path(sys.argv[1])
arm_this_process()
def publish():
    with published(folder / "whole") as temporary:
        (temporary / "one").write_text("1" * 100_000)
try:
    with as_user_error(folder):
        write_text(folder / "file", "2" * 100_000)
        persistently(publish)
        for number in range(3):
            append_json(folder / "lines", {"number": number})
except UserError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    library = build_shim(tmp_path_factory.mktemp("shim"))
    if library is None:
        pytest.skip("there is no C compiler")
    return library


@pytest.fixture
def write(shim, tmp_path):
    """Run the program under a fault; what it printed."""

    def run(fault):
        folder = tmp_path / "out"
        folder.mkdir()
        environment = os.environ | {"LD_PRELOAD": str(shim), FAULT: arm(folder, fault), "PYTHONPATH": "tests"}
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, folder], env=environment, capture_output=True, text=True, timeout=60
        )
        assert done.stderr == ""
        return folder, done.stdout

    return run


@pytest.mark.parametrize("after", [0, 2])
@pytest.mark.parametrize("call", ["write", "fsync", "open"])
@pytest.mark.parametrize("error", [28, 116])  # ENOSPC, ESTALE
def test_what_fails_once_is_done_again(call, error, after, write):
    folder, said = write(DiskFault(call, after, error, 1))
    assert said == ""
    assert (folder / "file").read_text() == "2" * 100_000
    assert (folder / "whole" / "one").read_text() == "1" * 100_000
    assert (folder / "lines").read_text() == '{"number": 0}\n{"number": 1}\n{"number": 2}\n'
    assert sorted(path.name for path in folder.iterdir()) == ["file", "lines", "whole"]


def test_short_writes_leave_nothing_out(write):
    folder, said = write(DiskFault("write", 0, 0, FOR_GOOD))
    assert said == ""
    assert (folder / "file").read_text() == "2" * 100_000
    assert (folder / "lines").read_text() == '{"number": 0}\n{"number": 1}\n{"number": 2}\n'


@pytest.mark.parametrize("call", ["write", "fsync", "rename", "open"])
def test_what_keeps_failing_is_one_line_and_leaves_nothing_behind(call, write):
    folder, said = write(DiskFault(call, 0, 5, FOR_GOOD))
    assert said.startswith("output.root: cannot write ")
    assert said.endswith(": Input/output error\n")
    assert len(said.splitlines()) == 1
    assert list(folder.iterdir()) == []
