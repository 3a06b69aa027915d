"""Verbs that show what runs came to."""

from pathlib import Path
from typing import Annotated

import typer


def report(
    run_directories: Annotated[list[Path], typer.Argument(metavar="RUN_DIR...", help="Directories of runs.")],
    out: Annotated[Path, typer.Option(help="The page; the same as Markdown is written beside it.")] = Path(
        "report.html"
    ),
    baseline: Annotated[
        str | None,
        typer.Option(
            help="What the others are compared with: a kind of method, or one of the directories; empty: sft."
        ),
    ] = None,
    compare: Annotated[
        str | None, typer.Option(help="Show published averages beside; paper: those of the paper and a re-run.")
    ] = None,
) -> None:
    """Write one page about runs: scores over seeds against a baseline, curves, settings that differ, answers."""
    from dskd.report.write import write_report

    for file in write_report(run_directories, out, baseline, compare):
        print(file)
