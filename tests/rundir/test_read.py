"""A run as data, from its directory alone."""

from pathlib import Path

import pytest

from dskd.config.changes import changed
from dskd.config.errors import UserError
from dskd.config.load import load_run, to_yaml
from dskd.rundir.read import read_run


@pytest.fixture
def run(make_run, tmp_path):
    return load_run(make_run(tmp_path))


def test_a_directory_tells_its_run_wherever_it_was_moved(run, tmp_path):
    moved = tmp_path / "moved" / Path(*run.directory.parts[-3:])
    moved.mkdir(parents=True)
    (moved / "run.yaml").write_text(to_yaml(run))
    assert read_run(moved).directory == moved
    assert changed(run, read_run(moved)) == {}


def test_a_moved_directory_keeps_the_end_of_its_path(run, tmp_path):
    (tmp_path / "run.yaml").write_text(to_yaml(run))
    with pytest.raises(UserError, match=r"must still end in .*/dskd_cma/default"):
        read_run(tmp_path)
