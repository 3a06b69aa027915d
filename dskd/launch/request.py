"""What is to be submitted: a run or an evaluation as one job, checked as far as a login node can."""

import os
import shutil
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dskd.config.cluster import ClusterConfig
from dskd.config.errors import UserError, require
from dskd.config.load import to_yaml
from dskd.config.run import RunConfig, accumulation_steps, check_paths, models_of, written_folders
from dskd.launch.container import rank_command
from dskd.rundir.layout import RunDirectory, evaluation_of

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
    request = Request(
        directory=run.directory,
        name=run.directory.name,
        command=rank_command(
            cluster,
            ("train", str(RunDirectory.of(run).job.settings)),
            inputs(run),
            written_folders(run),
            f"{os.getuid()}:{os.getgid()}",
        ),
        nodes=run.launch.nodes,
        tasks_per_node=run.launch.processes or cluster.gpus_per_node or 1,
        hours=run.launch.hours or cluster.hours,
        settings=to_yaml(run),
    )
    check_paths(run, coming)
    check(request, cluster, inputs(run))
    accumulation_steps(run, request.nodes * request.tasks_per_node)
    check_space(run)
    return request


def evaluate_request(
    model: Path, data: Path, seed: int, cluster: ClusterConfig, hours: float | None, options: Sequence[str]
) -> Request:
    """The job of one evaluation, of one file and one seed; it goes to eval/DATA/seedN in the model's run directory."""
    directory = evaluation_of(model.parent, data, seed)
    arguments = ("evaluate", str(model), "--data", str(data), "--seeds", str(seed), "--output", str(directory))
    command = rank_command(
        cluster, (*arguments, *options), [model, data.parent], [model.parent], f"{os.getuid()}:{os.getgid()}"
    )
    request = Request(directory, f"{data.stem}-seed{seed}", command, 1, 1, hours or cluster.hours)
    require(data.is_file(), "data", f"no such file: {data}")
    check(request, cluster, [data])
    return request


def inputs(run: RunConfig) -> list[Path]:
    """The folders that a run reads."""
    return [*models_of(run), run.data.train.parent, run.data.dev.parent]


def check(request: Request, cluster: ClusterConfig, read: Iterable[Path]) -> None:
    """Raise `UserError` for what the queue would only find out later."""
    seconds, lead = request.hours * 3600, cluster.signal_seconds
    require(
        seconds > lead,
        "launch.hours",
        f"{request.hours:g} ({seconds:.0f} s) is not longer than the profile's signal_seconds {lead}",
    )
    gpus = cluster.gpus_per_node
    require(
        not gpus or request.tasks_per_node <= gpus,
        "launch.processes",
        f"{request.tasks_per_node} is more than the {gpus} GPUs of a node (gpus_per_node of the cluster profile)",
    )
    image = cluster.container.image_file
    require(image is None or image.is_file(), "container.image", f"no such file: {image}")
    for path in (request.directory, *read):
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
