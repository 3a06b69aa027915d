"""What the verbs of `dskd data` do with models' tokenizers, and what they print."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.table import Table

from dskd.config.errors import UserError
from dskd.config.hub import find_model, model_name
from dskd.config.run import check_folder, require_folder
from dskd.data.prepare import CARD, Lengths, Preparing, prepare
from dskd.data.public import PUBLIC_SETS
from dskd.show import show


def prepare_set(
    name: str,
    source: Path,
    references: Path | None,
    folder: Path,
    tokenizers: Sequence[Path],
    numbers: tuple[int, int, int, int],
) -> None:
    """`dskd data prepare`. `numbers`: longest prompt, dev records, test records, seed."""
    if name not in PUBLIC_SETS:
        raise UserError(f"SET: allowed: {', '.join(PUBLIC_SETS)}; got {name!r}")
    check_folder("OUT", folder)
    measures = dict(counting(path) for path in tokenizers)
    card = prepare(name, source, references, Preparing(measures, *numbers), folder)
    table = Table("split", "records", "tokenizer", "prompt mean", "longest", "response mean", "longest", box=None)
    for split, about in card["splits"].items():
        rows = about["tokens"] or {"": None}
        for tokenizer, tokens in rows.items():
            sides = [tokens[side] for side in ("prompt", "response")] if tokens else []
            cells = [f"{side[key]:g}" for side in sides for key in ("mean", "longest")]
            table.add_row(split, str(about["records"]), tokenizer, *cells)
    show(table, 160)
    dropped = ", ".join(f"{count} {reason}" for reason, count in card.get("dropped", {}).items())
    print(f"dropped: {dropped or 'none'}; licence {card['licence']}; all of it in {folder / CARD}")


def counting(path: Path) -> tuple[str, Lengths]:
    """A model's name, and the tokens of a record for its tokenizer."""
    folder = find_model(path)
    require_folder("--tokenizer", folder)
    from dskd.data.tokenization import whole_lengths
    from dskd.models.load import load_tokenizer

    return model_name(folder.absolute()), partial(whole_lengths, load_tokenizer(folder, "--tokenizer"))
