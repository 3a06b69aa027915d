"""A cluster profile: what a Slurm cluster wants to be told. Strict and typed like a run file."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from dskd.config.errors import require, shown

# Names of sbatch's options that dskd sets itself, that have a key of their own here, or after which a job is no longer
# the one that it submitted: other tasks, other places for its logs, another answer of sbatch than its number.
OWN_OPTIONS = (
    *("account", "array", "chdir", "clusters", "constraint", "cpus-per-task", "dependency", "error", "export"),
    *("export-file", "input", "job-name", "kill-on-invalid-dep", "mem", "no-kill", "no-requeue", "nodes", "ntasks"),
    *("ntasks-per-core", "ntasks-per-gpu", "ntasks-per-node", "ntasks-per-socket", "open-mode", "output", "parsable"),
    *("partition", "qos", "quiet", "requeue", "signal", "tasks", "tasks-per-node", "test-only", "time", "wait"),
    *("workdir", "wrap"),
)
# A container that goes on by itself, or that two ranks on a node cannot both have.
BREAKING_ARGUMENTS = ("detach", "name", "restart")


@dataclass(frozen=True)
class ContainerConfig:
    runtime: Literal["none", "docker", "podman", "apptainer", "pyxis"] = "none"
    """What starts the training on a node: none runs it from the Python environment, the others in an image."""
    image: str = ""
    """Image: a name for docker and podman, a .sif file for apptainer, a .sqsh file or registry#name for pyxis."""
    mounts: tuple[str, ...] = ()
    """Folders to mount beside those of the run file, each /path (the same inside) or /host:/inside[:ro]."""
    arguments: tuple[str, ...] = ()
    """Further options of the container runtime, each --name or --name=value, such as --shm-size=16g."""
    command: tuple[str, ...] = ()
    """Command in the image that takes dskd's verbs; empty: its entry point for docker and podman, else dskd."""

    def __post_init__(self) -> None:
        if self.runtime == "none":
            for key in ("image", "mounts", "arguments", "command"):
                require(not getattr(self, key), key, "has no effect with runtime none")
            return
        require(bool(self.image), "image", f"is missing; runtime {self.runtime} needs one")
        require(not self.image.startswith("-"), "image", f"the name of an image is expected, got {shown(self.image)}")
        for mount in self.mounts:
            parts = mount.split(":")
            valid = len(parts) <= 3 and all(part.startswith("/") for part in parts[:2]) and parts[2:] in ([], ["ro"])
            expected = f"/path or /host:/inside[:ro] is expected, without commas, got {shown(mount)}"
            require(valid and "," not in mount, "mounts", expected)
        for argument in self.arguments:
            option = re.fullmatch(r"--([a-z][a-z0-9-]*)(=.*)?", argument)
            require(option is not None, "arguments", f"--name or --name=value is expected, got {shown(argument)}")
            name = option[1] if option else ""
            require(name not in BREAKING_ARGUMENTS, "arguments", f"--{name} would break the run's own containers")
        if self.image_file is not None:
            require(self.image_file.is_absolute(), "image", f"an absolute path is expected, got {self.image!r}")

    @property
    def image_file(self) -> Path | None:
        """The file that the image is, where it is one."""
        return Path(self.image) if self.image.endswith((".sif", ".sqsh")) else None


@dataclass(frozen=True)
class ClusterConfig:
    description: str = ""
    """One line for whoever chooses a profile."""
    partition: str | None = None
    """Partition (queue); empty takes the cluster's default."""
    account: str | None = None
    """Account that is charged."""
    qos: str | None = None
    """Quality of service."""
    constraint: str | None = None
    """Features that the nodes must have, such as a100."""
    sbatch: dict[str, str] = field(default_factory=dict)
    """Further options of sbatch without their dashes, such as {reservation: course, mail-type: FAIL}."""
    gpus_per_node: int = 0
    """GPUs that a node has; a run gets as many as it has processes on the node."""
    gpu_memory_gb: float | None = None
    """Memory in GB of a GPU; where given, `dskd submit` refuses what cannot fit."""
    gpu_tflops: float | None = None
    """Peak of a GPU in bf16, dense, for `dskd plan`; empty takes an H100's, 989."""
    cpus_per_node: int = 1
    """CPU cores that a node has; a run gets its share of them by GPUs."""
    memory_gb: int | None = None
    """Memory in GB of a node that a run gets; empty takes the cluster's default."""
    hours: float = 24.0
    """Time limit of each start of a run; a run that needs longer is requeued until it is finished."""
    signal_seconds: int = 300
    """How long before the time limit a run is told to save its state; more than one step and one save take."""
    max_requeues: int = 50
    """How often a run is started again at most."""
    shared: tuple[Path, ...] = ()
    """Folders on storage that all nodes and the login node share; where given, all paths of a run must lie in them."""
    scratch: Path | None = None
    """Folder on a node's own fast disk; runs save their states there first (checkpoint.scratch_dir)."""
    modules: tuple[str, ...] = ()
    """Environment modules to load on the nodes."""
    environment: dict[str, str] = field(default_factory=dict)
    """Environment variables of the run, such as {NCCL_SOCKET_IFNAME: ib0}."""
    python: Path | None = None
    """Python on the nodes that has torch and dskd, with runtime none; empty takes the one that submits."""
    container: ContainerConfig = ContainerConfig()
    """Container runtime and image."""

    def __post_init__(self) -> None:
        for key in ("gpus_per_node", "max_requeues"):
            require(getattr(self, key) >= 0, key, f"must not be negative, got {getattr(self, key)}")
        for key in ("cpus_per_node", "hours", "signal_seconds"):
            require(getattr(self, key) > 0, key, f"must be above 0, got {getattr(self, key)}")
        for key in ("memory_gb", "gpu_memory_gb", "gpu_tflops"):
            value = getattr(self, key)
            require(value is None or value > 0, key, f"must be above 0, got {value}")
        for key in ("partition", "account", "qos", "constraint"):
            require_words(key, [getattr(self, key)])
        require_words("modules", self.modules)
        for name, value in self.sbatch.items():
            check_option(name, value)
        for name in self.environment:
            valid = re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name)
            require(valid is not None, "environment", f"a name of letters, digits and _ is expected, got {shown(name)}")
        require(
            self.python is None or self.container.runtime == "none",
            "python",
            f"has no effect with container runtime {self.container.runtime}, whose image has its own",
        )


def require_words(key: str, words: Iterable[str | None]) -> None:
    """Raise `UserError` unless each text is one word that no line of a batch script takes for anything else."""
    for word in words:
        valid = word is None or re.fullmatch(r"""[^\s\\'"-][^\s\\'"]*""", word)
        expected = "one word without quotes and backslashes, and without a dash before it, is expected"
        require(bool(valid), key, f"{expected}, got {shown(word)}")


def check_option(name: str, value: str) -> None:
    """Raise `UserError` for a further option of sbatch that would not stay one, or not leave the job what it is.

    sbatch takes any beginning of an option's name for that option, and a backslash for an escape even within quotes.
    """
    valid = re.fullmatch(r"[a-z][a-z0-9-]*", name)
    require(
        valid is not None,
        "sbatch",
        f"names like mail-type, without dashes before them, are expected, got {shown(name)}",
    )
    taken = any(own.startswith(name) for own in OWN_OPTIONS)
    require(not taken, "sbatch", f"{name} is not for a profile to set; nor are {', '.join(OWN_OPTIONS)}")
    require("\\" not in value, "sbatch", f"{name}: text without backslashes is expected, got {shown(value)}")
