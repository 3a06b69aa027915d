"""How a command becomes ranks: this process alone, or the one that starts and supervises several."""

import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from dskd.config.errors import UserError
from dskd.config.hub import find_model
from dskd.config.run import (
    RunConfig,
    accumulation_steps,
    check_checkpoint,
    check_folder,
    check_folders,
    check_length,
    check_paths,
)
from dskd.config.stopping import UNFINISHED
from dskd.config.suites import NamedFile
from dskd.config.training import GenerationConfig, TrainConfig
from dskd.data.shard import Shard
from dskd.engine.preemption import Flags, Phase, Stopped, watch_signals
from dskd.rundir.layout import RunDirectory, evaluation_of

if TYPE_CHECKING:
    from dskd.evaluation.asked import Generation
    from dskd.plan.measured import Measured


RANK_BYTES = 300_000_000
"""Of a process that has imported torch, DeepSpeed and transformers."""


def start_training(run: RunConfig, force: bool) -> None:
    """Train on as many ranks as the run wants, or as the one rank that this process is."""
    check_before(run)
    if "RANK" not in os.environ:
        tell_ignored_nodes(run)
        processes = run.launch.processes or gpus()
        accumulation_steps(run, processes)
        start_ranks(processes)

    def work(flags: Flags) -> None:
        from dskd.engine import distributed
        from dskd.train import train

        train(run, distributed.start(flags, longest(run.train)), force)
        distributed.stop()

    def how() -> str:
        begun = RunDirectory.of(run).settings.is_file()
        return f"go on with: dskd resume {run.directory}" if begun else "it had not begun, and nothing of it stays"

    as_rank(run.train, work, how)


def start_caching(run: RunConfig, shard: Shard, output: Path | None) -> None:
    """Write a shard of the teacher's cache, on as many ranks as `start_training` would train on."""
    check_before(run)
    if output is not None:
        check_folder("--output", output)
    if "RANK" not in os.environ:
        tell_ignored_nodes(run)
        start_ranks(run.launch.processes or gpus())

    def work(flags: Flags) -> None:
        from dskd.engine import distributed
        from dskd.teachers.cache.write import write_cache

        write_cache(run, shard, distributed.start(flags, longest(run.train)), output)
        distributed.stop()

    as_rank(run.train, work, lambda: "go on with the same command")


def check_before(run: RunConfig) -> None:
    """Raise `UserError` for what can be told without torch."""
    from dskd.data.sources import check_source

    check_paths(run)
    check_folders(run)
    check_source(run.data.train)
    check_source(run.data.dev)


def longest(times: TrainConfig) -> float:
    """The minutes that one rank may keep the others waiting."""
    return max(times.start_minutes, times.stall_minutes, times.save_minutes)


def tell_ignored_nodes(run: RunConfig) -> None:
    if run.launch.nodes > 1:
        hint = "`dskd submit` starts them; by hand, set RANK, WORLD_SIZE and MASTER_ADDR for each rank"
        print(f"dskd: launch.nodes: {run.launch.nodes} is ignored, this machine works alone ({hint})", file=sys.stderr)


def measure_run(run: RunConfig) -> "Measured | None":
    """Some steps of a run on as many ranks as it wants here, or as the rank that this process is; rank 0 is told."""
    from dskd.launch.ranks import run_processes

    check_paths(run)
    if "RANK" not in os.environ:
        processes = run.launch.processes or gpus()
        accumulation_steps(run, processes)
        refuse_too_many(processes, "launch.processes")
        # On a CPU: what is freed goes back to the system at once, so that what is in use is counted and nothing else.
        os.environ |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_MMAP_MAX_": "10000000"}
        raise SystemExit(run_processes(sys.argv[1:], processes))
    from dskd.engine import distributed
    from dskd.measure import measure

    ranks = distributed.start()
    found = measure(run, ranks)
    distributed.stop()
    return found if ranks.is_main else None


def start_evaluation(
    model: Path,
    files: Sequence[NamedFile],
    seeds: Sequence[int],
    settings: GenerationConfig,
    precision: str,
    bos: bool,
    processes: int | None,
    output: Path | None,
) -> None:
    """`dskd evaluate`, on as many ranks as asked for, or as the one rank that this process is."""
    from dskd.data.sources import check_source
    from dskd.rundir.read import model_of

    model = model_of(find_model(model))
    folders = [output or evaluation_of(model, name) for name, _ in files]
    check_checkpoint(model)
    for (_, data), folder in zip(files, folders, strict=True):
        check_source(data)
        check_folder("--output", folder)
    check_length("--max-length", settings.max_length, model)
    if "RANK" not in os.environ:
        start_ranks(processes or gpus(), "--processes")

    def work(flags: Flags) -> None:
        from dskd.engine import distributed
        from dskd.evaluation.evaluate import Asked, Evaluation
        from dskd.evaluation.scores import average, told

        ranks = distributed.start(flags)
        evaluation = Evaluation(Asked(model, tuple(seeds), settings, precision, bos), ranks)
        found = []
        for (_, data), folder in zip(files, folders, strict=True):
            found.append(evaluation.evaluate(data, folder))
            if ranks.is_main:
                print(told(found[-1]))
                print(f"{found[-1]['records']} records, seeds {', '.join(map(str, found[-1]['seeds']))}: {folder}")
        if ranks.is_main and len(found) > 1:
            print(f"average of {len(found)} sets\n{told(average(found))}")
        distributed.stop()

    as_rank(TrainConfig(), work, lambda: "go on with the same command")


def start_harness(model: Path, suite: str, precision: str, batch_size: int) -> None:
    """`dskd evaluate --suite lm-eval:TASKS`, in this process."""
    from dskd.rundir.read import model_of

    model = model_of(find_model(model))
    check_checkpoint(model)
    check_folder("--suite", evaluation_of(model, "lm-eval"))
    from dskd.evaluation.harness import evaluate_tasks, parse_tasks

    for task, result in evaluate_tasks(model, parse_tasks(suite), precision, batch_size).items():
        values = [f"{name} {value['mean']:.4f}" for name, value in result.items() if isinstance(value, dict)]
        print(f"{task}: {', '.join(values)} ({result['records']} records)")


def start_generation(asked: "Generation", shard: Shard, processes: int | None) -> None:
    """`dskd generate`, on as many ranks as asked for, or as the one rank that this process is."""
    from dskd.data.sources import check_source
    from dskd.rundir.read import model_of

    asked = replace(asked, model=model_of(find_model(asked.model)))
    check_checkpoint(asked.model)
    check_source(asked.data)
    check_folder("--out", asked.out.parent)
    check_length("--max-length", asked.settings.max_length, asked.model)
    if asked.engine == "vllm" and processes not in (None, 1):
        raise UserError("--processes: vLLM starts its own; leave it out")
    if "RANK" not in os.environ:
        start_ranks(1 if asked.engine == "vllm" else processes or gpus(), "--processes")

    def work(flags: Flags) -> None:
        from dskd.engine import distributed
        from dskd.evaluation.generate import generate_records

        ranks = distributed.start(flags)
        told = generate_records(asked, shard, ranks)
        if ranks.is_main:
            print(told)
        distributed.stop()

    as_rank(TrainConfig(), work, lambda: "go on with the same command")


def as_rank(times: TrainConfig, work: Callable[[Flags], None], how: Callable[[], str]) -> None:
    """Do a rank's work; a stop that was asked for, and what another start mends, end it with `UNFINISHED`.

    `work` imports what it needs itself: that takes seconds, in which a stop may come. `how` says how to go on then.
    """
    from dskd.engine import watchdog

    limits: dict[Phase, float] = {
        "start": times.start_minutes,
        "step": times.stall_minutes,
        "save": times.save_minutes,
    }
    try:
        flags = watch_signals()  # from here on a stop may come between any two lines
        watchdog.show_stacks_on_request()
        with watchdog.watchdog(flags, limits), stop_before_errors(flags):
            work(flags)
    except Stopped as stopped:
        if os.environ["RANK"] == "0":
            saved = "" if stopped.saved is None else f", saved at step {stopped.saved}"
            print(f"dskd: stopped as asked{saved}; {how()}", file=sys.stderr)
        raise SystemExit(UNFINISHED) from None
    except RuntimeError as error:
        reason = watchdog.why_lost(error)
        if reason is None:
            raise
        print(*traceback.format_tb(error.__traceback__), sep="", end="", file=sys.stderr)  # where it waited
        watchdog.end_here(reason)


@contextmanager
def stop_before_errors(flags: Flags) -> Iterator[None]:
    """Before the first step, an error after a request to stop is that stop: a library took it for one of its own."""
    try:
        yield
    except Exception as error:
        if flags.stop_requested and flags.phase == "start":
            raise Stopped from error
        raise


def gpus() -> int:
    """One process for each visible GPU, or one without a GPU."""
    from dskd.engine.distributed import visible_gpus

    return max(1, visible_gpus())


def start_ranks(processes: int, key: str = "launch.processes") -> None:
    """Run this very command as several ranks and leave with their exit code; one process is this one.

    Raises `UserError` for more than this machine has memory for; `key` says how many there are.
    """
    from dskd.launch.ranks import free_port, rank_environment, run_processes

    if processes > 1:
        refuse_too_many(processes, key)
        raise SystemExit(run_processes(sys.argv[1:], processes))
    os.environ |= rank_environment(0, 1, free_port())


def refuse_too_many(processes: int, key: str) -> None:
    from dskd.plan.machine import GB, memory_of_this_machine

    needed, there = processes * RANK_BYTES, memory_of_this_machine()
    if needed > there:
        raise UserError(
            f"{key}: {processes} processes take {needed / GB:.0f} GB before they hold any model, and this machine has "
            f"{there / GB:.0f} GB"
        )


def leave(code: str | int | None) -> NoReturn:
    """End this process. A rank skips the interpreter's own end, which a thread of torch may abort (signal 6)."""
    if "RANK" not in os.environ or isinstance(code, str):
        sys.exit(code)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)
