"""A graph of runs and evaluations: submitted with Slurm's dependencies, or run here one after the other."""

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dskd.config.cluster import ClusterConfig
from dskd.config.errors import UserError
from dskd.config.load import load, load_run
from dskd.config.pipeline import PipelineConfig, StageConfig
from dskd.config.run import RunConfig
from dskd.config.stopping import UNFINISHED
from dskd.launch import slurm
from dskd.launch.request import Request, evaluate_request, train_request
from dskd.launch.submit import submit
from dskd.rundir.jobs import Jobs
from dskd.rundir.layout import RunDirectory
from dskd.rundir.read import is_complete


@dataclass(frozen=True)
class Stage:
    """One stage, ready to be submitted."""

    name: str
    needs: tuple[str, ...]
    requests: tuple[Request, ...]
    parallel: int | None

    @property
    def open(self) -> tuple[Request, ...]:
        """What is not complete yet."""
        return tuple(request for request in self.requests if not is_complete(RunDirectory(request.directory)))


def read_pipeline(file: Path, cluster: ClusterConfig) -> list[Stage]:
    """The stages in an order in which they can run, all checked. Raises `UserError` for the first mistake."""
    pipeline = load(file, PipelineConfig)
    found: dict[str, Stage] = {}
    for name in pipeline.ordered():
        config = pipeline.stages[name]
        models = {need: RunDirectory(found[need].requests[0].directory).best for need in config.needs}
        requests = tuple(requests_of(name, config, file, models, cluster))
        found[name] = Stage(name, config.needs, requests, config.parallel)
    return list(found.values())


def requests_of(
    name: str, config: StageConfig, file: Path, models: dict[str, Path], cluster: ClusterConfig
) -> Iterator[Request]:
    if config.run is None:
        model = models[config.evaluate or ""]
        for data in config.data:
            for seed in config.seeds:
                yield evaluate_request(model, Path(data).absolute(), seed, cluster, config.hours, config.options)
        return
    joined = [("teacher.path", config.teacher), ("student.path", config.student)]
    paths = [f"{key}={json.dumps(str(models[need]))}" for key, need in joined if need]
    run: RunConfig = load_run(file.parent / config.run, [f"output.name={name}", *paths, *config.settings])
    yield train_request(run, cluster, coming=list(models.values()))


def submit_pipeline(stages: Sequence[Stage], cluster_name: str, cluster: ClusterConfig) -> Iterator[tuple[Stage, str]]:
    """Submit what is not complete and not in the queue; yields each stage with what was done about it.

    If one cannot be submitted, those that this call submitted before are cancelled.
    """
    jobs: dict[str, list[str]] = {}
    submitted: list[str] = []
    try:
        for stage in stages:
            wanted = stage.open
            queued = in_queue(wanted)
            new = [request for request in wanted if request.directory not in queued]
            after = [job for need in stage.needs for job in jobs[need]]
            ids = submit(new, cluster_name, cluster, stage.parallel, after) if new else []
            submitted += ids
            jobs[stage.name] = sorted({job.partition("_")[0] for job in ids} | set(queued.values()))
            yield stage, told(stage, ids, list(queued.values()))
    except UserError:
        if submitted:
            slurm.patiently(lambda: slurm.run("scancel", *submitted))
        raise


def in_queue(requests: Sequence[Request]) -> dict[Path, str]:
    """Jobs of earlier submissions that are still in the queue, by run directory."""
    known = {r.directory: job.id for r in requests if (job := Jobs.at(r.directory).read()) is not None and job.id}
    active = slurm.queue(list(known.values()))
    return {directory: job for directory, job in known.items() if job in active}


def told(stage: Stage, ids: Sequence[str], queued: Sequence[str]) -> str:
    parts = [f"job {ids[0]}" if len(ids) == 1 else f"jobs {ids[0]} to {ids[-1]}"] if ids else []
    parts += [f"in the queue already as {', '.join(queued)}"] if queued else []
    complete = len(stage.requests) - len(stage.open)
    parts += [f"{complete} of {len(stage.requests)} complete already"] if complete else []
    return ", ".join(parts)


def run_here(stages: Sequence[Stage]) -> int:
    """Run the stages on this machine, one job at a time; the exit code.

    After a failure, what does not depend on it still runs. A job that wants to be run again ends all: so does this.
    """
    failed: set[str] = set()
    for stage in stages:
        missing = failed.intersection(stage.needs)
        if missing:
            print(f"{stage.name}: skipped, {', '.join(sorted(missing))} failed", file=sys.stderr)
            failed.add(stage.name)
            continue
        for request in stage.open:
            if request.settings is not None:
                jobs = Jobs.at(request.directory)
                jobs.write_file(jobs.folder.settings, request.settings)
            print(f"{stage.name}: {request.directory}", flush=True)
            code = subprocess.run(request.command, check=False).returncode
            if code == UNFINISHED:
                return UNFINISHED
            if code:
                failed.add(stage.name)
        if stage.name not in failed:
            print(f"{stage.name}: complete", flush=True)
    return 1 if failed else 0
