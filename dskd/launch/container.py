"""The command of a container, for docker/run and for a rank on its node: as few rights as training needs.

With docker and podman it is the calling user's, without capabilities, and writes to its mounts and to /tmp alone.
"""

import os
import re
import shlex
import sys
from collections.abc import Iterable, Sequence

from dskd.config.cluster import ClusterConfig
from dskd.launch.mounts import Mount, needed

RANK_VARIABLES = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "DSKD_SECRET"),
    "OMP_NUM_THREADS",
)
"""What a task of Slurm sets for its rank."""
# What has this prefix comes through into apptainer's clean environment. Neither home nor the folder where the job was
# submitted are mounted; /tmp is the node's. --containall would take InfiniBand and large files in /tmp away as well.
APPTAINER = """\
for name in {names}; do value=$(printenv "$name") && export "APPTAINERENV_$name=$value"; done
exec apptainer exec --cleanenv --no-home --no-mount=home,cwd "$@"
"""
# A step inside the job's own step, on this very node; srun passes signals on to what it started.
PYXIS = 'exec srun --overlap --nodes=1 --ntasks=1 --nodelist="$SLURMD_NODENAME" --no-container-mount-home "$@"'


def rank_command(cluster: ClusterConfig, arguments: Sequence[str], mounts: Iterable[Mount]) -> tuple[str, ...]:
    """The command of one rank: the plain process, or the same in a container.

    Args:
        arguments: those of dskd, such as ("train", "run.yaml").
        mounts: what it reads and writes.
    """
    container = cluster.container
    if container.runtime == "none":
        return (str(cluster.python or sys.executable), "-m", "dskd", *arguments)
    given = [Mount.parse(mount) for mount in container.mounts]
    shown = needed(mounts, given)
    # A folder on a node's own disk may not be there yet.
    folders = shlex.join(str(mount.source) for mount in shown if mount.writable and mount not in given)
    make = f"mkdir -p {folders} || exit\n" if folders else ""
    names = passed_variables(cluster)
    inside = (*(container.command or ("dskd",)), *arguments)
    match container.runtime:
        case "docker" | "podman" as engine:
            # Ranks on several nodes, and several on one node, find each other through the host's network and memory.
            options = ["--network=host", "--ipc=host", *(f"--env={name}" for name in names), *container.arguments]
            devices = gpu_devices(engine, "all") if cluster.gpus_per_node else []
            words = (*container.command, *arguments)
            command = engine_command(engine, container.image, shown, [*devices, *options], words)
            return ("sh", "-c", f'{make}exec "$@"', "dskd", *command)
        case "apptainer":
            return (
                *("sh", "-c", make + APPTAINER.format(names=" ".join(names)), "dskd"),
                *(["--nv"] if cluster.gpus_per_node else []),
                *(f"--bind={mount.short}" for mount in shown),
                *container.arguments,
                container.image,
                *inside,
            )
        case "pyxis":
            return (
                *("sh", "-c", make + PYXIS, "dskd"),
                f"--container-image={container.image}",
                f"--container-mounts={','.join(mount.short for mount in shown)}",
                f"--container-env={','.join(names)}",
                *container.arguments,
                "env",  # srun looks for the program on the node before it starts it in the image
                *inside,
            )


def engine_command(
    engine: str, image: str, mounts: Sequence[Mount], options: Sequence[str], words: Sequence[str]
) -> list[str]:
    """The whole command of docker or podman: `words` in a container that may do no more than the calling user."""
    places = {*(str(mount.target) for mount in mounts), *(option.partition(":")[0] for option in options)}
    # exec: Triton keeps there what it compiles, and loads it.
    own_tmp = {"/tmp", "--tmpfs=/tmp"} & places
    return [
        *(engine, "run", "--rm", f"--user={os.getuid()}:{os.getgid()}", "--read-only", "--cap-drop=ALL"),
        *("--security-opt=no-new-privileges", *([] if own_tmp else ["--tmpfs=/tmp:exec"])),
        *(podman_options() if engine == "podman" else []),
        *(f"--mount={mount.flag}" for mount in mounts),
        *options,
        image,
        *words,
    ]


def podman_options() -> list[str]:
    """Files belong to the caller also without root, and SELinux does not hide the mounts."""
    return ["--security-opt=label=disable", *(["--userns=keep-id"] if os.getuid() else [])]


def gpu_devices(engine: str, gpus: str) -> list[str]:
    """All GPUs, or those of some numbers such as 0,1."""
    if engine == "podman":
        return [f"--device=nvidia.com/gpu={number}" for number in gpus.split(",")]
    return ["--gpus=all" if gpus == "all" else f'--gpus="device={gpus}"']


def passed_variables(cluster: ClusterConfig) -> tuple[str, ...]:
    """Names of the environment variables that a container gets."""
    own = ("CUDA_VISIBLE_DEVICES",) if cluster.gpus_per_node else ()
    return tuple(dict.fromkeys((*RANK_VARIABLES, *own, *cluster.environment)))


def plain_name(text: str) -> str:
    """A text as a name that Slurm and container engines take."""
    return re.sub(r"[^a-zA-Z0-9_.-]", "_", text)
