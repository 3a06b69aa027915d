"""Verbs that make one model of another."""

from pathlib import Path
from typing import Annotated

import typer


def student(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A model's folder or org/model, as in a run file.")],
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder for the student.")],
    layers: Annotated[
        int | None, typer.Option(help="Layers, evenly of the model's, the first and the last always; empty: all.")
    ] = None,
    width: Annotated[int | None, typer.Option(help="Hidden size; empty: the model's.")] = None,
    heads: Annotated[int | None, typer.Option(help="Query heads, those for keys and values in proportion.")] = None,
    mlp: Annotated[int | None, typer.Option(help="Intermediate size of the MLP.")] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Another model, whose vocabulary the student gets; empty: the model's own.")
    ] = None,
    records: Annotated[
        Path | None,
        typer.Option(help="Records: what they use most stays, and layers are refitted to what was left out."),
    ] = None,
    tokens: Annotated[int, typer.Option(min=256, help="How many of their tokens are read.")] = 8192,
    dev: Annotated[
        Path | None, typer.Option(help="Records on which losses are told: of model, student, and a random one.")
    ] = None,
) -> None:
    """Make a smaller student of a model: fewer layers, less width, another vocabulary, what it knows kept.

    Without --records layers are only left out, and the student starts no better than a random one.
    """
    from dskd.students.make import show_student
    from dskd.students.shape import Shape

    show_student(model, folder, Shape(layers, width, heads, mlp), records, tokens, tokenizer, dev)


def convert(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="A folder with pickled .bin weights, or an old tokenizer.")
    ],
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder.")],
) -> None:
    """Save a model or a LoRA adapter anew, as safetensors with tokenizer.json; no code in its pickles runs."""
    from dskd.students.convert import convert as convert_folder

    convert_folder(model, folder)
