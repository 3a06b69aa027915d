"""The verbs of the launcher: what they read from the command line and print."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dskd.config.cluster import ClusterConfig
from dskd.config.errors import UserError
from dskd.config.hub import find_model
from dskd.config.load import load, load_run
from dskd.config.pipeline import StageConfig
from dskd.config.run import RunConfig, check_checkpoint
from dskd.config.suites import NamedFile
from dskd.launch import slurm
from dskd.launch.clusters import find_cluster
from dskd.launch.here import run_here
from dskd.launch.mounts import base_of
from dskd.launch.pipeline import Stage, read_pipeline, submit_pipeline, would_run, would_submit
from dskd.launch.request import Request, evaluate_request, train_request
from dskd.launch.status import Status, known_among, require_job, runs_under, statuses
from dskd.launch.submit import submission_text, submit
from dskd.plan.advice import judge, verdict_line
from dskd.plan.machine import Machine, assumed_machine, cluster_machine
from dskd.plan.measured import Measured, correct
from dskd.plan.models import read_models
from dskd.plan.table import show_plan
from dskd.rundir.jobs import Jobs
from dskd.rundir.layout import evaluation_of, evaluations_of
from dskd.rundir.read import is_complete, model_of, read_changed


def submit_runs(
    arguments: Sequence[str], cluster_name: str, parallel: int | None, dry_run: bool, force: bool = False
) -> None:
    """`dskd submit`: one run file, or several as an array."""
    files = [a for a in arguments if a.endswith((".yaml", ".yml"))]
    overrides = [a for a in arguments if a not in files]
    if not files:
        raise UserError("submit: a run file (RUN.yaml) is expected")
    name, cluster = find_cluster(cluster_name)
    runs = [load_run(Path(file), overrides) for file in files]
    requests = [train_request(run, cluster) for run in runs]
    refuse_twins(requests)
    for run in runs:
        tell_forecast(run, name, cluster, force)
    if dry_run:
        print(submission_text(requests, cluster, parallel))
        return
    for request, job in zip(requests, submit(requests, name, cluster, parallel), strict=True):
        print(f"job {job}: {request.directory}")


def tell_forecast(run: RunConfig, name: str, cluster: ClusterConfig, force: bool) -> None:
    """Print in a line whether a run fits, where the profile says how much memory a GPU has.

    Raises `UserError` for one that does not, unless `force`.
    """
    machine = cluster_machine(run, name, cluster)
    if machine is None:
        return
    try:
        found = judge(run, machine, read_models(run))
    except UserError as error:
        print(f"no forecast: {error}")
        return
    if not found.asked.fits and not force:
        raise UserError(f"{verdict_line(found)} (`dskd plan` shows more; --force submits it all the same)")
    print(verdict_line(found))


def show_forecasts(run: RunConfig, cluster_name: str | None, measured: Measured | None) -> None:
    """`dskd plan`. What was measured here corrects what is said of a cluster where both have GPUs, or none."""
    machine = assumed_machine(run) if measured is None else measured.machine
    if cluster_name is not None:
        name, cluster = find_cluster(cluster_name)
        machine = require_machine(run, name, cluster)
    found = judge(run, machine, read_models(run))
    if measured is not None:
        line, correction = correct(found.asked, measured)
        print(line)
        if machine.on_gpu == measured.machine.on_gpu:
            found = judge(run, machine, found.asked.models, correction)
    show_plan(found)


def require_machine(run: RunConfig, name: str, cluster: ClusterConfig) -> Machine:
    machine = cluster_machine(run, name, cluster)
    if machine is None:
        raise UserError(
            f"--cluster {name}: the profile says nothing of gpu_memory_gb (and gpus_per_node); both are needed"
        )
    return machine


def resubmit(directory: Path, overrides: Sequence[str], force: bool) -> None:
    """`dskd resume` of a submitted run: the same job again, on the same cluster."""
    jobs = Jobs.at(directory.absolute())
    job = require_job(jobs)
    started = jobs.directory.settings.is_file()
    run = read_changed(directory, overrides) if started else load_run(jobs.folder.settings, overrides)
    if not started and run.directory != jobs.directory.path:
        raise UserError(f"{directory}: is a shard of a teacher's cache; `dskd pipeline` called again goes on with it")
    if is_complete(jobs.directory) and not overrides:
        raise UserError(f"{directory}: this run is finished already")
    cluster = load(jobs.folder.cluster, ClusterConfig)
    request = train_request(run, cluster)
    if force:
        request = replace(request, command=(*request.command, "--force"))
    (id_,) = submit([request], job.cluster, cluster)
    print(f"job {id_}: {jobs.directory.path}")


def run_pipeline(file: Path, cluster_name: str | None, local: bool, dry_run: bool) -> int:
    """`dskd pipeline`; the exit code."""
    if local == (cluster_name is not None):
        raise UserError("pipeline: either --cluster NAME or --local is expected")
    name, cluster = find_cluster(cluster_name) if cluster_name else ("", ClusterConfig(cpus_per_node=1))
    stages = read_pipeline(file, cluster)
    if dry_run:
        print("\n".join(would_run(stages) if local else would_submit(stages, cluster)))
        return 0
    if local:
        return run_here(stages)
    for stage, what in submit_pipeline(stages, name, cluster):
        print(f"{stage.name}: {what}")
        for request in stage.requests:
            print(f"  {shown_path(request.directory)}")
    return 0


def refuse_twins(requests: Sequence[Request]) -> None:
    seen: set[Path] = set()
    for request in requests:
        if request.directory in seen:
            raise UserError(f"output.name: two of the runs would write to {request.directory}; give each its own")
        seen.add(request.directory)


def submit_evaluations(
    model: Path,
    files: Sequence[NamedFile],
    stage: StageConfig,
    cluster_name: str,
    dry_run: bool,
) -> None:
    """`dskd evaluate --jobs`: each file with each seed as one job of an array, as a stage of a pipeline has them."""
    model = model_of(find_model(model)).absolute()
    check_checkpoint(model)
    name, cluster = find_cluster(cluster_name, "--jobs")
    base = base_of(model)
    requests = [
        evaluate_request(model, base, data.absolute(), (seed,), evaluation_of(model, set_, seed), stage, cluster)
        for set_, data in files
        for seed in stage.seeds
    ]
    stages = [Stage("evaluate", (), tuple(requests))]
    if dry_run:
        print("\n".join(would_submit(stages, cluster)))
        return
    for _, what in submit_pipeline(stages, name, cluster):
        print(f"{what}: {shown_path(evaluations_of(model))}")


def show_status(directories: Sequence[Path] | None) -> None:
    """`dskd status`: one block a run."""
    found = list(directories or runs_under(Path("outputs")))
    if not found:
        raise UserError("status: no run is under outputs/; name a run directory")
    known, others = known_among(found)
    if others:
        print(f"skipped, no run (no run.yaml in it): {', '.join(map(str, others))}", file=sys.stderr)
    for status in statuses(known):
        print(format_status(status))


def format_status(status: Status) -> str:
    """One run, or one evaluation, in a few lines."""
    where = f" on {status.nodes}" if status.nodes else ""
    note = f" ({status.note})" if status.note else ""
    kind = "here" if status.job is None else f"job {status.job}"
    lines = [f"{shown_path(status.directory)}", f"  {kind} {status.state}{where}{note}"]
    lines.append(f"  {', '.join(figures(status))}")
    if status.best is not None:
        lines.append(f"  best model {status.best.folder} ({status.best.scores})")
    if status.restarts:
        lines.append(f"  started again {len(status.restarts)} times: {', '.join(status.restarts)}")
    return "\n".join(lines)


def figures(status: Status) -> list[str]:
    """How far a run or a shard of a cache is, or the score of an evaluation, which has no steps."""
    if status.rougel is not None:
        return [f"ROUGE-L {status.rougel:.2f}"]
    if status.shard is not None:
        return [str(status.shard)]
    of = f"/{status.total_steps}" if status.total_steps else ""
    found = [f"step {status.step}{of}"]
    if status.tokens_per_second is not None:
        found.append(f"{status.tokens_per_second:.0f} tokens/s")
    if status.seconds_left is not None:
        found.append(f"about {status.seconds_left / 60:.1f} min left")
    return [*found, f"last state at step {status.state_step}" if status.state_step else "no state yet"]


def shown_path(path: Path) -> Path:
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def cancel_runs(directories: Sequence[Path], now: bool) -> None:
    """`dskd cancel`: running jobs are asked to save and stop, pending ones leave the queue."""
    for directory in directories:
        jobs = Jobs.at(directory.absolute())
        job = require_job(jobs)
        entry = slurm.queue([job.id]).get(job.id) if job.id else None
        if entry is None or job.id is None:
            print(f"{directory}: job {job.id} is not in the queue")
        elif entry.state == "RUNNING" and not now:
            jobs.write_file(jobs.folder.cancel, "")
            slurm.cancel(job.id, options=["--signal=USR2"])
            print(f"job {job.id}: asked to save its state and to stop; `dskd status {directory}` shows when it has")
        else:
            there = slurm.cancel(job.id)
            print(f"job {job.id}: " + ("cancelled" if there else "has left the queue by now"))
