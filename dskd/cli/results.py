"""Verbs that show what runs came to."""

from pathlib import Path
from typing import Annotated

import typer


def report(
    run_directories: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN_DIR...", help="Directories of runs; and of models that were evaluated, such as a teacher."
        ),
    ],
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


def analyze(
    model: Annotated[
        Path, typer.Argument(metavar="RUN_DIR|MODEL", help="A run, whose best model is compared, or any model.")
    ],
    teacher: Annotated[Path | None, typer.Option(help="The model to compare with; empty: the run's teacher.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="Records, in any form of data.train; empty: the run's data.dev.")
    ] = None,
    records: Annotated[int, typer.Option(min=1, help="The first so many of them.")] = 200,
    lengths: Annotated[
        tuple[int, int] | None,
        typer.Option(help="Tokens of prompt and response together, and of the prompt; empty: the run's, or 512 256."),
    ] = None,
    precision: Annotated[str, typer.Option(help="bf16 or fp32.")] = "bf16",
) -> None:
    """Measure how near a student came to its teacher, in the structure of hidden states and in distributions.

    Of a run also how near it was before. analysis.json in the folder has what is printed, and `dskd report` shows it.
    """
    from dskd.show import show_analysis

    show_analysis(model, teacher, data, records, lengths, precision)
