"""Verbs around a cluster: what a run will need, and its jobs there."""

from pathlib import Path
from typing import Annotated

import typer

from dskd.cli.options import Overrides

RunDirectories = Annotated[
    list[Path] | None,
    typer.Argument(metavar="[RUN_DIR]...", help="Run directories; empty: all under outputs/."),
]
Cluster = Annotated[
    str, typer.Option(help="Cluster profile: the name of a file in slurm/clusters, or the path of a YAML file.")
]


def plan(
    run_file: Annotated[
        Path, typer.Argument(metavar="RUN.yaml", help="A run file; config.json of its models is enough.")
    ],
    overrides: Overrides = None,
    cluster: Annotated[
        str | None,
        typer.Option(help="Cluster profile: a name in slurm/clusters, or a YAML file; empty: 8 H100."),
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Train three steps here first, write nothing, and correct what is said.")
    ] = False,
) -> None:
    """Tell what a run will need, before it is in any queue: memory, disk, time and nodes, for each teacher backend."""
    from dskd.config.load import load_run
    from dskd.launch.verbs import show_forecasts

    run, measured = load_run(run_file, overrides or []), None
    if measure:
        from dskd.start import measure_run

        measured = measure_run(run)
        if measured is None:
            return  # another rank tells
    show_forecasts(run, cluster, measured)


def submit(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN.yaml... [KEY=VALUE]...", help="Run files, and settings over theirs.")
    ],
    cluster: Cluster,
    parallel: Annotated[
        int | None, typer.Option(min=1, help="Of several runs, at most so many at a time; empty: no limit.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be submitted, and submit nothing.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Submit even what does not fit on a GPU.")] = False,
) -> None:
    """Submit runs to a Slurm cluster; several make one job array.

    A run is started again by itself after a preemption, a lost node or the time limit. Submitting a run that stopped
    before its end continues it.
    """
    from dskd.launch.verbs import submit_runs

    submit_runs(runs, cluster, parallel, dry_run, force)


def status(directories: RunDirectories = None) -> None:
    """Show state, progress, best model and restarts of runs, those of this machine and submitted ones."""
    from dskd.launch.verbs import show_status

    show_status(directories)


def logs(
    directory: Annotated[Path, typer.Argument(metavar="RUN_DIR")],
    rank: Annotated[int, typer.Option(min=0, help="Whose output.")] = 0,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on until the run has ended.")] = False,
) -> None:
    """Print what a rank of a submitted run wrote, over all of its starts."""
    from dskd.launch.status import print_logs

    print_logs(directory, rank, follow)


def cancel(
    directories: Annotated[list[Path], typer.Argument(metavar="RUN_DIR...")],
    now: Annotated[bool, typer.Option("--now", help="At once, without saving a state first.")] = False,
) -> None:
    """Stop submitted runs after they have saved their state; `dskd resume` continues them."""
    from dskd.launch.verbs import cancel_runs

    cancel_runs(directories, now)


def pipeline(
    file: Annotated[Path, typer.Argument(metavar="PIPELINE.yaml", help="Stages that train and evaluate.")],
    cluster: Annotated[
        str | None, typer.Option(help="Cluster profile: a name in slurm/clusters, or a YAML file.")
    ] = None,
    local: Annotated[bool, typer.Option("--local", help="Run the stages here, without Slurm.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be submitted or run, and do nothing.")
    ] = False,
) -> None:
    """Run a graph of trainings and evaluations, each after those it needs; what is complete already is skipped."""
    from dskd.launch.verbs import run_pipeline

    raise SystemExit(run_pipeline(file, cluster, local, dry_run))
