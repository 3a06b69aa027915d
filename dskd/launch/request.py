"""What is to be submitted as one job, checked as far as possible: a run, an evaluation, a shard of a cache, ..."""

import os
import shutil
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from dskd.config.cluster import ClusterConfig
from dskd.config.errors import UserError, require
from dskd.config.load import is_plain, to_yaml
from dskd.config.pipeline import GenerateConfig, MakeConfig, StageConfig
from dskd.config.run import (
    RunConfig,
    accumulation_steps,
    check_checkpoint,
    check_folder,
    check_model_folder,
    check_paths,
    require_folder,
)
from dskd.launch.container import rank_command
from dskd.launch.mounts import Mount, evaluation_mounts, model_mounts, run_mounts
from dskd.rundir.layout import RunDirectory, analysis_of, evaluation_of, part_of

STATE_BYTES = 7
"""Bytes of one state for each byte of bf16 weights: weights, and fp32 weights and both moments of AdamW."""


@dataclass(frozen=True)
class Request:
    """One job to submit."""

    directory: Path
    """The run directory, or the folder of an evaluation; of what becomes a file or a model a folder for job/ alone."""
    name: str
    command: tuple[str, ...]
    """What each rank runs."""
    nodes: int
    tasks_per_node: int
    hours: float
    settings: str | None = None
    """Text of the run file that the ranks are given; None where there is none."""
    result: Path | None = None
    """The file or folder that is there once the job is complete; None where `directory` tells."""


def train_request(run: RunConfig, cluster: ClusterConfig, coming: Collection[Path] = ()) -> Request:
    """The job of a training run.

    Args:
        coming: models and records that earlier jobs will have written.

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
    model: Path,
    base: Path | None,
    data: Path,
    seeds: Sequence[int],
    output: Path,
    stage: StageConfig,
    cluster: ClusterConfig,
) -> Request:
    """The job of one evaluation, of one file.

    Args:
        base: the model that an adapter belongs to.
        output: where its answers and results go.
    """
    require(data.is_file(), "data", f"no such file: {data}")
    numbers = ",".join(map(str, seeds))
    arguments = ("evaluate", str(model), "--data", str(data), "--seeds", numbers, "--output", str(output))
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
    """A stage's settings as options of `dskd evaluate` and `generate`: all, so that no default can part the two."""
    settings = asdict(stage.generation) | {"bos": stage.bos, "precision": stage.precision, "processes": stage.processes}
    return [
        f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}")
        for name, value in settings.items()
        if value is not False and value is not None
    ]


def generate_request(
    asked: GenerateConfig,
    shard: int,
    model: Path,
    base: Path | None,
    stage: StageConfig,
    name: str,
    cluster: ClusterConfig,
) -> Request:
    """The job of one share of the answers to a file of prompts; the last one to find all of them writes the file.

    Args:
        base: the model that an adapter belongs to.
    """
    if asked.model is not None:
        check_checkpoint(model)
    require(asked.data.is_file(), "generate.data", f"no such file: {asked.data}")
    check_folder("generate.out", asked.out.parent)
    vllm = asked.engine == "vllm" and stage.processes not in (None, 1)
    require(not vllm, "processes", "vLLM starts its own; leave it out")
    which = [f"--data={asked.data}", f"--out={asked.out}", f"--shard={shard}/{stage.shards}"]
    how = [f"--seed={asked.seed}", f"--engine={asked.engine}", *(["--whole"] if asked.whole else [])]
    return on_one_node(
        part_of(asked.out, shard, stage.shards).with_suffix(""),
        name if stage.shards == 1 else f"{name}-{shard}",
        ("generate", str(model), *which, *how, *evaluation_options(stage)),
        evaluation_mounts(model, [asked.data], asked.out.parent, base),
        stage.hours,
        cluster,
        asked.out,
        stage.processes or 1,
    )


def analyze_request(run: RunConfig, directory: Path, stage: StageConfig, name: str, cluster: ClusterConfig) -> Request:
    """The job that compares the best model of a run with its teacher, both of which need not be there yet."""
    models = [run.teacher.path] if run.teacher is not None else []
    mounts = [*run_mounts(run), *(mount for model in models for mount in model_mounts(model))]
    arguments = ("analyze", str(directory), f"--records={stage.records}", f"--precision={stage.precision}")
    out = evaluation_of(directory, "analysis")
    return on_one_node(out, name, arguments, mounts, stage.hours, cluster, analysis_of(directory))


def make_request(
    make: MakeConfig, name: str, hours: float | None, cluster: ClusterConfig, coming: Collection[Path] = ()
) -> Request:
    """The job that makes a student; see `train_request`."""
    check_model_folder("make.model", make.model)
    check_folder("make.out", make.out)
    if make.tokenizer is not None:
        require_folder("make.tokenizer", make.tokenizer)
    files = {"make.records": make.records, "make.dev": make.dev}
    for key, file in files.items():
        require(file is None or file in coming or file.is_file(), key, f"no such file: {file}")
    options = {field.name: getattr(make, field.name) for field in fields(make)}
    model, out = options.pop("model"), options.pop("out")
    given = [f"--{key}={value}" for key, value in options.items() if value is not None]
    mounts = [
        *(mount for folder in (make.model, make.tokenizer) if folder for mount in model_mounts(folder)),
        *(Mount.of(file) for file in files.values() if file),
        Mount.of(make.out.parent, writable=True),
    ]
    return on_one_node(make.out, name, ("student", str(model), str(out), *given), mounts, hours, cluster, make.out)


def report_request(page: Path, runs: Sequence[Path], name: str, hours: float | None, cluster: ClusterConfig) -> Request:
    """The job that writes a report about runs; it is never complete, so that a page knows all of the newest scores."""
    mounts = [*map(Mount.of, runs), Mount.of(page.parent, writable=True)]
    return on_one_node(page, name, ("report", *map(str, runs), f"--out={page}"), mounts, hours, cluster)


def on_one_node(
    out: Path,
    name: str,
    arguments: Sequence[str],
    mounts: Sequence[Mount],
    hours: float | None,
    cluster: ClusterConfig,
    result: Path | None = None,
    processes: int = 1,
) -> Request:
    """A job that writes `out`; what is known of the job lies beside, in OUT.job."""
    request = Request(
        directory=out.with_name(f"{out.name}.job"),
        name=name,
        command=rank_command(cluster, arguments, mounts),
        nodes=1,
        tasks_per_node=processes,
        hours=hours or cluster.hours,
        result=result,
    )
    check(request, cluster, mounts, "")
    return request


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
