"""What is to be submitted: a run, an evaluation or a shard of a cache as one job, checked as far as possible."""

import os
import shutil
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from dskd.config.cluster import ClusterConfig
from dskd.config.errors import UserError, require
from dskd.config.load import is_plain, to_yaml
from dskd.config.pipeline import StageConfig
from dskd.config.run import RunConfig, accumulation_steps, check_paths
from dskd.launch.container import rank_command
from dskd.launch.mounts import Mount, evaluation_mounts, run_mounts
from dskd.rundir.layout import RunDirectory

STATE_BYTES = 7
"""Bytes of one state for each byte of bf16 weights: weights, and fp32 weights and both moments of AdamW."""


@dataclass(frozen=True)
class Request:
    """One job to submit."""

    directory: Path
    """The run directory, or the folder of an evaluation."""
    name: str
    command: tuple[str, ...]
    """What each rank runs."""
    nodes: int
    tasks_per_node: int
    hours: float
    settings: str | None = None
    """Text of the run file that the ranks are given; None for an evaluation."""


def train_request(run: RunConfig, cluster: ClusterConfig, coming: Collection[Path] = ()) -> Request:
    """The job of a training run.

    Args:
        coming: models that earlier jobs will have written.

    Raises:
        UserError: for what cannot work there.
    """
    if cluster.scratch is not None and run.checkpoint.scratch_dir is None:
        run = replace(run, checkpoint=replace(run.checkpoint, scratch_dir=cluster.scratch))
    check_paths(run, coming)
    mounts = run_mounts(run)
    request = Request(
        directory=run.directory,
        name=run.directory.name,
        command=rank_command(cluster, ("train", str(RunDirectory.of(run).job.settings)), mounts),
        nodes=run.launch.nodes,
        tasks_per_node=run.launch.processes or cluster.gpus_per_node or 1,
        hours=run.launch.hours or cluster.hours,
        settings=to_yaml(run),
    )
    check(request, cluster, mounts, "launch.")
    accumulation_steps(run, request.nodes * request.tasks_per_node)
    check_space(run)
    return request


def cache_request(
    run: RunConfig, shard: int, shards: int, cluster: ClusterConfig, coming: Collection[Path] = ()
) -> Request:
    """The job that makes one shard of the cache of a run's teacher; see `train_request`."""
    check_paths(run, coming)
    mounts, directory = run_mounts(run), RunDirectory(run.directory / f"shard{shard}-of-{shards}")
    which = ("--shard", f"{shard}/{shards}", "--output", str(directory.path))
    arguments = ("teacher", "cache", str(directory.job.settings), *which)
    request = Request(
        directory=directory.path,
        name=f"{run.directory.name}-{shard}",
        command=rank_command(cluster, arguments, mounts),
        nodes=run.launch.nodes,
        tasks_per_node=run.launch.processes or cluster.gpus_per_node or 1,
        hours=run.launch.hours or cluster.hours,
        settings=to_yaml(run),
    )
    check(request, cluster, mounts, "launch.")
    return request


def evaluate_request(
    model: Path, base: Path | None, data: Path, seed: int, output: Path, stage: StageConfig, cluster: ClusterConfig
) -> Request:
    """The job of one evaluation, of one file and one seed.

    Args:
        base: the model that an adapter belongs to.
        output: where its answers and results go.
    """
    require(data.is_file(), "data", f"no such file: {data}")
    arguments = ("evaluate", str(model), "--data", str(data), "--seeds", str(seed), "--output", str(output))
    mounts = evaluation_mounts(model, [data], output, base)
    request = Request(
        directory=output,
        name="-".join(output.parts[-2:]),
        command=rank_command(cluster, (*arguments, *evaluation_options(stage)), mounts),
        nodes=1,
        tasks_per_node=stage.processes or 1,
        hours=stage.hours or cluster.hours,
    )
    check(request, cluster, mounts, "")
    return request


def evaluation_options(stage: StageConfig) -> list[str]:
    """A stage's settings as options of `dskd evaluate`: all of them, so that no default can part the two."""
    settings = asdict(stage.generation) | {"bos": stage.bos, "precision": stage.precision, "processes": stage.processes}
    return [
        f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}")
        for name, value in settings.items()
        if value is not False and value is not None
    ]


def check(request: Request, cluster: ClusterConfig, mounts: Iterable[Mount], section: str) -> None:
    """Raise `UserError` for what the queue would only find out later.

    Args:
        section: of the keys that say how long and on how many processes.
    """
    seconds, lead = request.hours * 3600, cluster.signal_seconds
    require(
        seconds > lead,
        f"{section}hours",
        f"{request.hours:g} ({seconds:.0f} s) is not longer than the profile's signal_seconds {lead}",
    )
    gpus = cluster.gpus_per_node
    require(
        not gpus or request.tasks_per_node <= gpus,
        f"{section}processes",
        f"{request.tasks_per_node} is more than the {gpus} GPUs of a node (gpus_per_node of the cluster profile)",
    )
    image = cluster.container.image_file
    require(image is None or image.is_file(), "container.image", f"no such file: {image}")
    # Slurm makes names of files of these, and takes a backslash for an escape even within quotes.
    odd = "\\" in str(request.directory) or "%" in str(request.directory)
    require(
        not odd and all(map(is_plain, str(request.directory))),
        "output",
        f"{request.directory}: % and \\ and line breaks in a path mean something else to Slurm; choose another name",
    )
    for path in (request.directory, *(mount.source for mount in mounts if not mount.writable)):
        shared = not cluster.shared or any(path.is_relative_to(folder) for folder in cluster.shared)
        allowed = ", ".join(str(folder) for folder in cluster.shared)
        require(shared, "shared", f"{path} is not in a folder that all nodes share (cluster profile: {allowed})")
    parent = next(p for p in (request.directory, *request.directory.parents) if p.exists())
    require(os.access(parent, os.W_OK | os.X_OK), "output.root", f"{parent} is not writable")


def check_space(run: RunConfig) -> None:
    """Raise `UserError` where the models and states that a run keeps would not fit on the disk."""
    weights = sum(file.stat().st_size for file in run.student.path.glob("*.safetensors"))
    needed = weights * (run.checkpoint.keep_best + 1)
    if run.student.lora is None:
        needed += 2 * STATE_BYTES * weights
    parent = next(p for p in (run.directory, *run.directory.parents) if p.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise UserError(
            f"output.root: {free / 1e9:.1f} GB are free in {parent}, and the run needs about {needed / 1e9:.1f} GB"
        )
