"""Prints the software bill of materials of an image (CycloneDX, JSON): its Python packages and those of the system."""

import subprocess
import sys
from importlib.metadata import Distribution, distributions
from pathlib import Path

from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL

DPKG_LINE = "${Package} ${Version} ${Architecture}\n"


def python_component(package: Distribution) -> Component:
    name, version = package.metadata["Name"], package.version
    reference = PackageURL("pypi", None, name.lower().replace("_", "-"), version)
    return Component(type=ComponentType.LIBRARY, name=name, version=version, purl=reference, bom_ref=str(reference))


def system_component(line: str) -> Component:
    name, version, architecture = line.split()
    reference = PackageURL("deb", distribution(), name, version, {"arch": architecture})
    return Component(type=ComponentType.LIBRARY, name=name, version=version, purl=reference, bom_ref=str(reference))


def distribution() -> str:
    """debian or ubuntu."""
    lines = Path("/etc/os-release").read_text(encoding="utf-8").splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line)["ID"].strip('"')


def main(environment: Path) -> None:
    packages = distributions(path=[str(p) for p in environment.glob("lib/python3*/site-packages")])
    components = [python_component(package) for package in packages]
    found = subprocess.run(["dpkg-query", "-W", "-f", DPKG_LINE], capture_output=True, text=True, check=True)
    components += [system_component(line) for line in found.stdout.splitlines()]
    (dskd,) = (component for component in components if component.name == "dskd")
    bom = Bom(components=[component for component in components if component is not dskd])
    bom.metadata.component = dskd
    print(JsonV1Dot6(bom).output_as_string(indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
