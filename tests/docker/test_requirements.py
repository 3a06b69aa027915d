"""The locked packages of the image are those of the constraints, each with hashes."""

import re
from pathlib import Path

import pytest

DOCKER = Path(__file__).resolve().parents[2] / "docker"
LOCKS = sorted(DOCKER.glob("requirements*.txt"))


def pins(file: Path) -> dict[str, str]:
    found = re.findall(r"^([a-z0-9.-]+)==([^\s;]+)", file.read_text(), re.MULTILINE)
    return {name.replace(".", "-"): version for name, version in found}


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.name)
def test_versions_are_those_of_the_constraints(lock):
    constraints = pins(DOCKER / "constraints.txt")
    shared = {name: version for name, version in pins(lock).items() if name in constraints}
    assert shared
    assert shared == {name: constraints[name] for name in shared}


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.name)
def test_every_package_has_a_hash(lock):
    entries = re.split(r"\n(?=\S)", lock.read_text().strip())
    assert len(entries) == len(pins(lock))
    assert all("--hash=sha256:" in entry for entry in entries)


def test_no_package_is_locked_twice():
    torch, rest = pins(DOCKER / "requirements-torch.txt"), pins(DOCKER / "requirements.txt")
    assert "torch" in torch
    assert "deepspeed" in rest
    assert not torch.keys() & rest.keys()
