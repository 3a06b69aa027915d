"""A graph of stages, read, and submitted with Slurm's dependencies; `here.py` runs it without Slurm."""

import json
import shlex
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from dskd.config.cluster import ClusterConfig
from dskd.config.errors import UserError
from dskd.config.load import load, load_run
from dskd.config.pipeline import GenerateConfig, PipelineConfig, StageConfig
from dskd.config.run import RunConfig
from dskd.launch import slurm
from dskd.launch.mounts import base_of
from dskd.launch.request import (
    Request,
    analyze_request,
    cache_request,
    evaluate_request,
    generate_request,
    make_request,
    report_request,
    train_request,
)
from dskd.launch.submit import submission_text, submit
from dskd.rundir.jobs import Jobs
from dskd.rundir.layout import RunDirectory, evaluation_of
from dskd.rundir.read import is_complete, model_of
from dskd.rundir.shard import read_shard, settings_sum


@dataclass(frozen=True)
class Stage:
    """One stage, ready to be submitted."""

    name: str
    needs: tuple[str, ...]
    requests: tuple[Request, ...]
    parallel: int | None = None
    models: tuple[Path, ...] = ()
    """What it leaves: the best model of each training, or the student that it makes; they need not be there yet."""
    run: RunConfig | None = None
    """Of a stage that trains; the first, where there are several."""
    texts: tuple[Path, ...] = ()
    """Files of records that it or a stage before it writes; they need not be there yet."""

    @property
    def open(self) -> tuple[Request, ...]:
        """What is not complete yet."""
        return tuple(request for request in self.requests if not is_done(request))

    @property
    def best(self) -> Path:
        """The one model that it leaves, or the first of them."""
        return self.models[0]

    @property
    def trains_adapter(self) -> bool:
        return self.run is not None and self.run.student.lora is not None

    @property
    def base(self) -> Path | None:
        """The model that `best` belongs to where it is, or will be, an adapter."""
        return self.run.student.path if self.run and self.run.student.lora else base_of(self.best)


def is_done(request: Request) -> bool:
    """Whether a job is complete. A shard of a cache is so only as long as its run file is the same."""
    if request.result is not None:
        return request.result.exists()
    directory = RunDirectory(request.directory)
    shard = read_shard(directory)
    same = shard is None or shard.settings == settings_sum(request.settings or "")
    return same and is_complete(directory)


def read_pipeline(file: Path, cluster: ClusterConfig) -> list[Stage]:
    """The stages in an order in which they can run, all checked. Raises `UserError` for the first mistake."""
    pipeline = load(file, PipelineConfig)
    found: dict[str, Stage] = {}
    for name in pipeline.ordered():
        found[name] = read_stage(file, pipeline, name, found, cluster)
    refuse_twins(file, found.values())
    return list(found.values())


def read_stage(
    file: Path, pipeline: PipelineConfig, name: str, found: Mapping[str, Stage], cluster: ClusterConfig
) -> Stage:
    """One stage; `found` has those that it needs."""
    config, needs = pipeline.stages[name], pipeline.needs(name)
    texts = tuple(text for need in needs for text in found[need].texts)
    stage = Stage(name, needs, (), config.parallel, texts=texts)
    if config.make is not None:
        request = make_request(config.make, name, config.hours, cluster, texts)
        return replace(stage, requests=(request,), models=(config.make.out,))
    if config.report is not None:
        runs = [request.directory for other in pipeline.reported(config) for request in found[other].requests]
        return replace(stage, requests=(report_request(config.report, runs, name, config.hours, cluster),))
    if config.evaluate is not None:
        return replace(stage, requests=tuple(evaluations(config, found[config.evaluate], cluster)))
    if config.analyze is not None:
        return replace(stage, requests=tuple(analyses(file, name, config, found[config.analyze], cluster)))
    if config.generate is not None:
        requests = tuple(generations(name, config, config.generate, found, cluster))
        return replace(stage, requests=requests, texts=(*texts, config.generate.out))
    coming = [*texts, *(found[need].best for need in (config.teacher, config.student) if need)]
    settings = [f"output.name={json.dumps(name, ensure_ascii=False)}", *models_given(file, name, config, found)]
    settings += [*pipeline.settings, *config.settings]
    if config.cache is not None:
        run = load_run(file.parent / config.cache, settings)
        requests = tuple(cache_request(run, i, config.shards, cluster, coming) for i in range(config.shards))
        return replace(stage, requests=requests)
    seeded = [
        [f"output.name={json.dumps(f'{name}-seed{seed}', ensure_ascii=False)}", f"train.seed={seed}"]
        for seed in config.train_seeds
    ]
    runs_of = [load_run(file.parent / (config.run or ""), [*settings, *own]) for own in seeded or [[]]]
    requests = tuple(train_request(run, cluster, coming) for run in runs_of)
    models = tuple(RunDirectory(request.directory).best for request in requests)
    return replace(stage, requests=requests, models=models, run=runs_of[0])


def models_given(file: Path, name: str, config: StageConfig, found: Mapping[str, Stage]) -> Iterator[str]:
    """The settings that name the models of other stages. Raises `UserError` for an adapter."""
    for role, need in (("teacher", config.teacher), ("student", config.student)):
        if need and found[need].trains_adapter:
            raise UserError(
                f"{file}: stages.{name}.{role}: {need} trains a LoRA adapter, and a whole model is expected"
            )
        if need:
            yield f"{role}.path={json.dumps(str(found[need].best), ensure_ascii=False)}"


def evaluations(config: StageConfig, trained: Stage, cluster: ClusterConfig) -> Iterator[Request]:
    """For each model and file one job with each seed, or one with all seeds."""
    for model in trained.models:
        for name, data in config.files():
            for seeds in [config.seeds] if config.together else [(seed,) for seed in config.seeds]:
                output = evaluation_of(model.parent, name, None if config.together else seeds[0])
                yield evaluate_request(model, trained.base, data.absolute(), seeds, output, config, cluster)


def analyses(file: Path, name: str, config: StageConfig, trained: Stage, cluster: ClusterConfig) -> Iterator[Request]:
    """A job for each training. Raises `UserError` where there is no teacher to compare with."""
    if trained.run is None or trained.run.teacher is None:
        raise UserError(f"{file}: stages.{name}.analyze: {trained.name} has no teacher to compare its model with")
    for model in trained.models:
        yield analyze_request(trained.run, model.parent, config, name, cluster)


def generations(
    name: str, config: StageConfig, asked: GenerateConfig, found: Mapping[str, Stage], cluster: ClusterConfig
) -> Iterator[Request]:
    """A job for each share of the prompts, for the model of a stage or of a folder."""
    if config.teacher is not None:
        model, base = found[config.teacher].best, found[config.teacher].base
    else:
        model = model_of(asked.model or Path())
        base = base_of(model)
    for shard in range(config.shards):
        yield generate_request(asked, shard, model, base, config, name, cluster)


def refuse_twins(file: Path, stages: Iterable[Stage]) -> None:
    """Raise `UserError` where two jobs would have one directory: what the first leaves would pass for the second's."""
    seen: dict[Path, str] = {}
    for stage in stages:
        for request in stage.requests:
            if request.directory in seen:
                both = " and ".join(dict.fromkeys((seen[request.directory], stage.name)))
                raise UserError(f"{file}: stages: two jobs of {both} would write to {request.directory}")
            seen[request.directory] = stage.name


def submit_pipeline(stages: Sequence[Stage], cluster_name: str, cluster: ClusterConfig) -> Iterator[tuple[Stage, str]]:
    """Submit what is not complete and not in the queue; yields each stage with what was done about it.

    If one cannot be submitted, those that this call submitted before are cancelled.
    """
    jobs: dict[str, list[str]] = {}
    submitted: list[str] = []
    try:
        for stage in stages:
            new, queued = unsubmitted(stage)
            after = [job for need in stage.needs for job in jobs[need]]
            ids = submit(new, cluster_name, cluster, stage.parallel, after) if new else []
            submitted += ids
            jobs[stage.name] = sorted({job.partition("_")[0] for job in ids} | set(queued))
            yield stage, ", ".join([*numbered(ids), *there_already(stage, queued)])
    except UserError:
        if submitted:
            with suppress(UserError):  # why the submission failed is what matters
                slurm.cancel(*submitted)
        raise


def would_submit(stages: Sequence[Stage], cluster: ClusterConfig) -> Iterator[str]:
    """What `submit_pipeline` would submit, as text; the names of stages stand for the jobs that others wait for."""
    waited_for: set[str] = set()
    for stage in stages:
        new, queued = unsubmitted(stage)
        after = [need for need in stage.needs if need in waited_for]
        if new or queued:
            waited_for.add(stage.name)
        count = [f"{len(new)} job{'s' if len(new) > 1 else ''}"] if new else []
        waits = [f"after {', '.join(after)}"] if new and after else []
        yield f"# stage {stage.name}: {', '.join([*count, *waits, *there_already(stage, queued)])}"
        if new:
            yield submission_text(new, cluster, stage.parallel, after)


def would_run(stages: Sequence[Stage]) -> Iterator[str]:
    """What `here.run_here` would run, as text."""
    for stage in stages:
        if not stage.open:
            yield f"# stage {stage.name}: complete"
        for request in stage.open:
            yield f"# stage {stage.name}: {request.directory}\n{shlex.join(request.command)}"


def unsubmitted(stage: Stage) -> tuple[list[Request], list[str]]:
    """What is neither complete nor in the queue, and the jobs that are in the queue."""
    wanted = stage.open
    queued = in_queue(wanted)
    return [request for request in wanted if request.directory not in queued], list(queued.values())


def in_queue(requests: Sequence[Request]) -> dict[Path, str]:
    """Jobs of earlier submissions that are still in the queue, by run directory; none where there is no Slurm."""
    if shutil.which("squeue") is None:
        return {}
    known = {r.directory: job.id for r in requests if (job := Jobs.at(r.directory).read()) is not None and job.id}
    active = slurm.queue(list(known.values()))
    return {directory: job for directory, job in known.items() if job in active}


def numbered(ids: Sequence[str]) -> list[str]:
    return [f"job {ids[0]}" if len(ids) == 1 else f"jobs {ids[0]} to {ids[-1]}"] if ids else []


def there_already(stage: Stage, queued: Sequence[str]) -> list[str]:
    complete = len(stage.requests) - len(stage.open)
    parts = [f"in the queue already as {', '.join(queued)}"] if queued else []
    return [*parts, *([f"{complete} of {len(stage.requests)} complete already"] if complete else [])]
