"""One entry point: dskd VERB. A verb's modules are imported only when it runs, so that help answers at once."""

import os
import sys
from typing import Annotated

import typer

from dskd import __version__
from dskd.cli import answers, cluster, here, results, students
from dskd.cli.data import data
from dskd.config.errors import UserError
from dskd.start import leave

app = typer.Typer(
    help="Distil a large language model into a small one, white-box, whatever the two vocabularies are.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
teacher = typer.Typer(no_args_is_help=True)
VERBS = (
    here.train,
    here.resume,
    here.collect,
    answers.evaluate,
    answers.generate,
    answers.judge,
    results.analyze,
    results.report,
    cluster.plan,
    cluster.submit,
    cluster.status,
    cluster.logs,
    cluster.cancel,
    cluster.pipeline,
    students.student,
    students.convert,
    here.align,
    here.settings,
    here.recipes,
    here.quickstart,
)
"""In the order of the help."""
ENVIRONMENT = {
    # Threads that wait without spinning: beside other work, spinning ones cost a factor of five to ten.
    "OMP_WAIT_POLICY": "passive",
    # torch asks the kernel for huge pages for large tensors in host memory. Each step takes its memory anew, and
    # without them up to a quarter of a CPU's time goes into handing it out page by page.
    "THP_MEM_ALLOC_ENABLE": "1",
}
"""Of this process and of all that it starts, unless the user says otherwise; it counts only before torch is loaded."""


def main() -> None:
    """Run the command line; a user's mistake is one line on stderr and exit code 2."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        app(args=join_numbers(sys.argv[1:]), prog_name="dskd")
    except UserError as error:
        print(f"dskd: {error}", file=sys.stderr)
        leave(2)
    except OSError as error:
        print(f"dskd: {error.filename or 'this system'}: {error.strerror or error}", file=sys.stderr)
        leave(2)
    except SystemExit as end:
        leave(end.code)


def join_numbers(arguments: list[str]) -> list[str]:
    """`--seeds 10 20` -> `--seeds 10,20`: an option takes one value, and a list of numbers is typed with spaces."""
    joined: list[str] = []
    for argument in arguments:
        if argument.isdecimal() and len(joined) > 1 and joined[-2] == "--seeds" and not joined[-1].startswith("-"):
            joined[-1] += f",{argument}"
        else:
            joined.append(argument)
    return joined


def show_version(wanted: bool) -> None:
    if wanted:
        print(f"dskd {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    pass


for verb in VERBS:
    app.command()(verb)
teacher.command()(here.cache)
app.add_typer(teacher, name="teacher", help="What a student learns from, made ready beforehand.")
app.add_typer(data, name="data")
