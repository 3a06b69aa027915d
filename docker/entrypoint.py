"""What a container runs: `dskd ARGUMENTS`, or another program if the first argument names one.

Before a job it looks for what most often goes wrong in a container and says each in one line: what cannot work ends it
with code 2, the rest is a warning. Knows no torch, so that it adds nothing to the start.
"""

import ctypes
import os
import resource
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dskd.config.run import RunConfig

HERE = Path("/opt/dskd")
# Batches on their way from the workers, and NCCL's buffers; docker's default of 64 MiB is too small for them.
SHARED_MEMORY_PER_RANK = 128 * 2**20


@dataclass(frozen=True)
class Job:
    """What the checks need to know of a command."""

    processes: int | None
    """Processes that it asks for; None means one for each GPU."""
    workers: int
    output: Path
    """Folder that it writes to, which need not exist yet."""


@dataclass(frozen=True)
class Driver:
    gpus: int
    """GPUs that are visible in this container."""
    cuda: tuple[int, int]
    """Newest CUDA version that it runs."""


def main(arguments: list[str], environment: Mapping[str, str] = os.environ) -> None:
    if not os.access("/tmp", os.W_OK):
        os.environ.setdefault(
            "TMPDIR", "/dev/shm"
        )  # what is writable even where the root is not and /tmp is part of it
    if arguments and (program := shutil.which(arguments[0])):
        os.execv(program, arguments)
    job = job_of(arguments)
    if job is not None and environment.get("LOCAL_RANK", "0") == "0":
        driver, placed = find_driver(), "RANK" in environment
        failures = [*gpu_problems(job, driver, placed, built_for()), *output_problems(job.output)]
        for line in warnings(job, driver, placed):
            print(f"dskd: warning: {line}", file=sys.stderr)
        for line in failures:
            print(f"dskd: {line}", file=sys.stderr)
        if failures:
            sys.exit(2)
    os.execv(sys.executable, [sys.executable, "-m", "dskd", *arguments])


def job_of(arguments: Sequence[str]) -> Job | None:
    """None for a command that trains or evaluates nothing, or whose mistake dskd itself will tell."""
    if not arguments or arguments[0] not in ("train", "resume", "evaluate", "teacher"):
        return None
    from dskd.config.errors import UserError  # here: help is to answer at once
    from dskd.config.load import load_run, override
    from dskd.rundir.read import read_run

    try:
        match [word for word in arguments if word != "--force"]:
            case ["train", file, *overrides]:
                return job_of_run(load_run(Path(file), overrides))
            case ["teacher", "cache", file, *others]:
                return job_of(["train", file, *(word for word in others if "=" in word and not word.startswith("-"))])
            case ["resume", directory, *overrides]:
                return job_of_run(override(read_run(Path(directory)), overrides))
            case ["evaluate", folder, *options]:
                processes = option(options, "--processes")
                return Job(int(processes) if processes else None, 0, Path(option(options, "--output") or folder))
    except (UserError, ValueError):
        pass
    return None


def job_of_run(run: "RunConfig") -> Job:
    return Job(run.launch.processes, run.data.workers, run.directory)


def option(arguments: Sequence[str], name: str) -> str | None:
    for argument, following in zip(arguments, [*arguments[1:], None], strict=True):
        if argument.startswith(f"{name}="):
            return argument.partition("=")[2]
        if argument == name:
            return following
    return None


def find_driver() -> Driver | None:
    """What the NVIDIA driver says, through the library that `--gpus` puts into a container; None without it."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    count, version = ctypes.c_int(0), ctypes.c_int(0)
    cuda.cuDriverGetVersion(ctypes.byref(version))
    if cuda.cuInit(0) == 0:
        cuda.cuDeviceGetCount(ctypes.byref(count))
    return Driver(count.value, (version.value // 1000, version.value % 1000 // 10))


def built_for(folder: Path = HERE) -> str:
    """CUDA version of the installed torch, or "" for a build without CUDA."""
    return (folder / "cuda-version").read_text(encoding="utf-8").strip()


def gpu_problems(job: Job, driver: Driver | None, placed: bool, cuda: str) -> Iterator[str]:
    """`placed`: a launcher has placed this process as one rank of many, and decides about GPUs itself."""
    gpus = driver.gpus if driver else 0
    if driver and cuda and driver.cuda[0] < int(cuda.split(".")[0]):
        found = ".".join(map(str, driver.cuda))
        yield f"the NVIDIA driver is too old: it runs CUDA {found}, and this image needs CUDA {cuda}; update the driver"
    elif job.processes is None and not gpus and not placed:
        yield "no GPU is visible in this container: start it with --gpus all, or set launch.processes to train on CPUs"
    elif job.processes and 0 < gpus < job.processes and not placed:
        yield f"launch.processes: {job.processes}, but {gpus} GPU(s) are visible in this container"


def output_problems(folder: Path) -> Iterator[str]:
    parent = existing(folder)
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        yield (
            f"{folder}: cannot be written by user {os.getuid()}:{os.getgid()} ({error.strerror}): mount a folder there "
            f"that belongs to this user, and start with --user $(id -u):$(id -g)"
        )


def existing(folder: Path) -> Path:
    """The nearest folder above that is there."""
    return next(path for path in (folder, *folder.absolute().parents) if path.is_dir())


def warnings(job: Job, driver: Driver | None, placed: bool, root: Path = Path("/")) -> Iterator[str]:
    gpus = driver.gpus if driver else 0
    ranks = 1 if placed else job.processes or max(1, gpus)
    shared = os.statvfs("/dev/shm")
    size, needed = shared.f_frsize * shared.f_blocks, ranks * SHARED_MEMORY_PER_RANK
    if size < needed and (ranks > 1 or job.workers):
        yield (
            f"/dev/shm has {size >> 20} MiB, and {ranks} rank(s) with {job.workers} worker(s) each may need "
            f"{needed >> 20} MiB: start with --shm-size 8g or --ipc host"
        )
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if gpus and (ranks > 1 or placed) and locked != resource.RLIM_INFINITY:
        yield f"memlock is limited to {locked >> 10} KiB, which NCCL may exceed: start with --ulimit memlock=-1"
    if existing(job.output).stat().st_dev == root.stat().st_dev:
        yield f"{job.output} is on no mount: what is written there vanishes with this container"


if __name__ == "__main__":
    main(sys.argv[1:])
