"""A real Slurm cluster of four nodes on this machine, and what a user does with it.

slurm     session fixture: the cluster is up, and SLURM_CONF names it; its folder.
profile   session fixture: `profile(**keys)` writes a cluster profile over slurm/clusters/local.yaml; its path.
"""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ruamel.yaml import YAML
from support.cluster import DOWN, LOCAL, ROOT, bring_up


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("slurm")
    with pytest.MonkeyPatch.context() as patch:
        bring_up(folder)
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        patch.setenv("PYTHONPATH", str(ROOT))
        yield folder
        subprocess.run([DOWN, "--folder", folder], check=True)


Profile = Callable[..., Path]


@pytest.fixture(scope="session")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Profile:
    folder = tmp_path_factory.mktemp("profiles")

    def write(**keys: object) -> Path:
        file = folder / f"profile{len(list(folder.iterdir()))}.yaml"
        yaml = YAML(typ="safe", pure=True)
        yaml.dump({"extends": str(LOCAL), **keys}, file)
        return file

    return write


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = why_no_cluster()
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slurm)
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))


def why_no_cluster() -> str | None:
    """Why this machine can have no cluster, or None."""
    if os.geteuid() != 0:
        return "a cluster on one machine needs root"
    if not all(map(shutil.which, ("slurmctld", "slurmd", "sbatch", "munged"))) and shutil.which("apt-get") is None:
        return "Slurm is not installed, and there is no apt-get to install it"
    return None
