"""Verbs that work on this machine."""

import os
from pathlib import Path
from typing import Annotated

import typer

from dskd.cli.options import Force, Overrides


def train(
    run_file: Annotated[Path, typer.Argument(metavar="RUN.yaml", help="The run file; `dskd settings` lists its keys.")],
    overrides: Overrides = None,
    force: Force = False,
) -> None:
    """Train a student as a run file says, or go on where an earlier start of the same run stopped.

    Uses all GPUs of this machine, or launch.processes on CPUs; where RANK and WORLD_SIZE are set already, this process
    joins as that rank. Everything is written to output.root/STUDENT/METHOD/output.name. Exit code 75 means that the run
    is not finished and goes on when the same command is run again.
    """
    from dskd.config.load import load_run
    from dskd.start import start_training

    start_training(load_run(run_file, overrides or []), force)


def resume(
    run_directory: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The directory of a run, as it wrote it.")],
    overrides: Overrides = None,
    force: Force = False,
    here: Annotated[
        bool, typer.Option("--here", help="On this machine, even where the run was submitted to a cluster.")
    ] = False,
) -> None:
    """Go on with a run that was stopped, from its directory alone: here, or on the cluster that it was submitted to."""
    from dskd.rundir.layout import RunDirectory
    from dskd.rundir.read import read_changed

    if not here and "RANK" not in os.environ and RunDirectory(run_directory).job.submission.is_file():
        from dskd.launch.verbs import resubmit

        return resubmit(run_directory, overrides or [], force)
    from dskd.start import start_training

    start_training(read_changed(run_directory, overrides or []), force)


def collect(
    run_directories: Annotated[list[Path], typer.Argument(metavar="RUN_DIR...", help="Directories of runs.")],
    to: Annotated[Path, typer.Option(help="Where the models and index.json go.")],
) -> None:
    """Gather the saved models of many runs in one place, verified, with an index; what is there is not copied again."""
    from dskd.config.run import check_folder
    from dskd.show import show_collected

    check_folder("--to", to)
    show_collected(run_directories, to)


def align(
    teacher: Annotated[
        Path, typer.Argument(metavar="TEACHER", help="A model's folder or org/model, as in a run file.")
    ],
    student: Annotated[Path, typer.Argument(metavar="STUDENT", help="The same of the student.")],
    cache_dir: Annotated[Path, typer.Option(help="Where maps are kept; a run's data.cache_dir.")] = Path(
        "outputs/cache"
    ),
) -> None:
    """Map each teacher token to its nearest student token, for method mined, and tell how many match."""
    from dskd.show import show_alignment

    show_alignment(teacher, student, cache_dir)


def cache(
    run_file: Annotated[Path, typer.Argument(metavar="RUN.yaml", help="The run file of a training.")],
    overrides: Overrides = None,
    shard: Annotated[
        str, typer.Option(metavar="I/N", help="Of N tasks that may run at a time, the share of task I, from 0.")
    ] = "0/1",
    output: Annotated[
        Path | None, typer.Option(help="Folder for shard.json, which tells how much of the share is made.")
    ] = None,
) -> None:
    """Run the teacher once over the training records, and keep its hidden states for teacher.backend=cache.

    What is in the cache already is not made again, and many runs share it; see data.cache_dir and
    teacher.cache_precision. Exit code 75 means that it was asked to stop: the same command goes on.
    """
    from dskd.config.load import load_run
    from dskd.data.shard import Shard
    from dskd.start import start_caching

    start_caching(load_run(run_file, overrides or []), Shard.parse(shard), output)


def settings(
    prefix: Annotated[str, typer.Argument(help="Show keys that begin with this, such as train or engine.")] = "",
    search: Annotated[str, typer.Option(help="Show keys with this word in their name, type or help.")] = "",
    cluster: Annotated[bool, typer.Option("--cluster", help="Those of a cluster profile instead.")] = False,
) -> None:
    """List every key of a run file, or of a cluster profile, with its type, default and help."""
    from dskd.show import show_settings

    show_settings(prefix, search, cluster)


def recipes(
    folder: Annotated[Path | None, typer.Argument(help="Where to look; default: the jobs that come with dskd.")] = None,
) -> None:
    """List the run files in jobs/, one line each: method, student, teacher and what else there is to say."""
    from dskd.show import show_recipes

    show_recipes(folder)


def quickstart() -> None:
    """Distil a real 135 M-parameter teacher into a smaller student with another vocabulary, here and in minutes.

    All of it goes to outputs/quickstart; what is complete there is not made again.
    """
    from dskd.quickstart import quickstart as run_quickstart

    raise SystemExit(run_quickstart())
