"""Cluster profiles by name: the YAML files in slurm/clusters of this folder, and those that come with dskd."""

from pathlib import Path

import dskd
from dskd.config.cluster import ClusterConfig
from dskd.config.errors import UserError
from dskd.config.load import load
from dskd.config.names import unknown


def find_cluster(name: str, option: str = "--cluster") -> tuple[str, ClusterConfig]:
    """The name and the profile that `name`, or the path of a YAML file, stands for; `UserError` lists those known."""
    if name.endswith((".yaml", ".yml")):
        return Path(name).stem, load(Path(name), ClusterConfig)
    profiles = known_profiles()
    if name not in profiles:
        folders = " and ".join(str(f) for f in profile_folders())
        raise UserError(f"{option}: {unknown('cluster', name, sorted(profiles))} (files in {folders}; or PATH.yaml)")
    return name, load(profiles[name], ClusterConfig)


def known_profiles() -> dict[str, Path]:
    """Profiles by name; one of this folder goes over one that comes with dskd. _NAME.yaml is there to be extended."""
    files = [file for folder in reversed(profile_folders()) for file in sorted(folder.glob("[!_]*.yaml"))]
    return {file.stem: file for file in files}


def profile_folders() -> list[Path]:
    package = Path(dskd.__file__).parent
    candidates = (Path.cwd(), package, package.parent)
    return list(dict.fromkeys(f for c in candidates if (f := c / "slurm" / "clusters").is_dir()))
