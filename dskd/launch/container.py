"""The command that a rank runs on its node: the plain process, or the same in a container."""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from dskd.config.cluster import ClusterConfig, ContainerConfig

RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# What has this prefix comes through into apptainer's clean environment.
APPTAINER = """\
for name in {names}; do value=$(printenv "$name") && export "APPTAINERENV_$name=$value"; done
exec apptainer exec --cleanenv --no-home "$@"
"""
# A step inside the job's own step, on this very node; srun passes signals on to what it started.
PYXIS = 'exec srun --overlap --nodes=1 --ntasks=1 --nodelist="$SLURMD_NODENAME" "$@"'


def rank_command(
    cluster: ClusterConfig, arguments: Sequence[str], read: Iterable[Path], write: Iterable[Path], user: str
) -> tuple[str, ...]:
    """The command of one rank.

    Args:
        arguments: those of dskd, such as ("train", "run.yaml").
        read: folders that the run reads.
        write: folders that it writes to.
        user: UID:GID that docker and podman run as.
    """
    container = cluster.container
    inside = (*(container.command or ("dskd",)), *arguments)
    mounts = all_mounts(container, read, [*write, *([cluster.scratch] if cluster.scratch else [])])
    names = passed_variables(cluster)
    gpus = cluster.gpus_per_node > 0
    match container.runtime:
        case "none":
            return (str(cluster.python or sys.executable), "-m", "dskd", *arguments)
        case "docker" | "podman":
            device = {"docker": "--gpus=all", "podman": "--device=nvidia.com/gpu=all"}[container.runtime]
            return (
                *(container.runtime, "run", "--rm", "--network=host", "--ipc=host", f"--user={user}"),
                *([device] if gpus else []),
                *(f"--volume={mount}" for mount in mounts),
                *(f"--env={name}" for name in names),
                *container.arguments,
                container.image,
                *container.command,
                *arguments,
            )
        case "apptainer":
            return (
                *("sh", "-c", APPTAINER.format(names=" ".join(names)), "apptainer"),
                *(["--nv"] if gpus else []),
                *(f"--bind={mount}" for mount in mounts),
                *container.arguments,
                container.image,
                *inside,
            )
        case "pyxis":
            return (
                *("sh", "-c", PYXIS, "srun"),
                f"--container-image={container.image}",
                f"--container-mounts={','.join(mounts)}",
                f"--container-env={','.join(names)}",
                *container.arguments,
                "env",  # srun looks for the program on the node before it starts it in the image
                *inside,
            )


def passed_variables(cluster: ClusterConfig) -> tuple[str, ...]:
    """Names of the environment variables that a container gets."""
    own = ("CUDA_VISIBLE_DEVICES",) if cluster.gpus_per_node else ()
    return (*RANK_VARIABLES, "OMP_NUM_THREADS", *own, *cluster.environment)


def all_mounts(container: ContainerConfig, read: Iterable[Path], write: Iterable[Path]) -> list[str]:
    """HOST:INSIDE[:ro] of the profile's mounts, and of the run's own folders unless a mount shows them already."""
    wanted = {str(path): True for path in read} | {str(path): False for path in write}
    explicit = {m.split(":")[-1 - m.endswith(":ro")]: m.endswith(":ro") for m in container.mounts}
    shown = wanted | explicit
    own = [
        f"{path}:{path}{':ro' if read_only else ''}"
        for path, read_only in sorted(wanted.items())
        if path not in explicit and not any(shows(outer, shown[outer], path, read_only) for outer in shown)
    ]
    return [m if ":" in m else f"{m}:{m}" for m in container.mounts] + own


def shows(outer: str, outer_read_only: bool, path: str, read_only: bool) -> bool:
    """Whether a mount of `outer` makes `path` visible, and writable where it must be."""
    return outer != path and Path(path).is_relative_to(outer) and (read_only or not outer_read_only)
