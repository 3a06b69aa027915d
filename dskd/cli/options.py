"""Arguments that several verbs take."""

from typing import Annotated

import typer

Force = Annotated[bool, typer.Option("--force", help="Go on with a run even where changed settings make it another.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Settings over those of the run file, such as train.lr=1e-4."),
]
