"""Verbs around records: dskd data VERB."""

from pathlib import Path
from typing import Annotated

import typer

from dskd.cli.options import Overrides

data = typer.Typer(no_args_is_help=True, help="Records: public sets made ready, and what is in those of a run.")


@data.command()
def prepare(
    name: Annotated[str, typer.Argument(metavar="SET", help="dolly, self-inst, vicuna, sinst or uinst.")],
    source: Annotated[
        Path,
        typer.Argument(metavar="SOURCE", help="The public file or folder, or a folder that the authors processed."),
    ],
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder: train, dev, valid.jsonl, card.json.")],
    references: Annotated[Path | None, typer.Option(help="For vicuna: the file of answers.")] = None,
    tokenizer: Annotated[
        list[Path] | None,
        typer.Option(help="A model whose tokens are counted; repeat it. The first decides which prompts are too long."),
    ] = None,
    max_prompt_length: Annotated[int, typer.Option(min=1, help="Tokens of a prompt, for the first tokenizer.")] = 256,
    dev: Annotated[int, typer.Option(min=0, help="Records of dev, where a set is split (dolly).")] = 1000,
    test: Annotated[int, typer.Option(min=0, help="Records of valid, the test records, where it is split.")] = 500,
    seed: Annotated[int, typer.Option(min=0, help="Decides what is drawn.")] = 10,
) -> None:
    """Turn a public instruction set into records, by template, filters and splits, with a card of what they are."""
    from dskd.show_data import prepare_set

    prepare_set(name, source, references, folder, tokenizer or [], (max_prompt_length, dev, test, seed))


@data.command()
def check(
    run_file: Annotated[
        Path, typer.Argument(metavar="RUN.yaml", help="A run file; the tokenizers of its models are read.")
    ],
    overrides: Overrides = None,
    records: Annotated[int, typer.Option(min=1, help="Records of each split to tokenize, evenly spread.")] = 2000,
) -> None:
    """Look at the records of a run: counts, cuts, lengths, repeated prompts, alignment, examples with their labels."""
    from dskd.config.load import load_run
    from dskd.show_data import check_run

    check_run(load_run(run_file, overrides or []), records)
