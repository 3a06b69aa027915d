"""What the verbs of `dskd data` do with models' tokenizers, and what they print."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from dskd.config.errors import UserError
from dskd.config.hub import find_model, model_name
from dskd.config.run import RunConfig, check_folder, check_paths, require_folder
from dskd.data.prepare import CARD, Lengths, Preparing, prepare
from dskd.data.public import PUBLIC_SETS
from dskd.show import show

if TYPE_CHECKING:
    from dskd.data.check import Side
    from dskd.data.records import Record
    from dskd.data.tokenization import Limits


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


EXAMPLES = 3
MOST_NAMED = 8
"""Records that a line names."""


def check_run(run: RunConfig, most: int) -> None:
    """`dskd data check`."""
    from dskd.data import check
    from dskd.data.records import read_records
    from dskd.data.sources import check_source, lines_of
    from dskd.data.tokenization import Limits
    from dskd.models.load import load_tokenizer

    check_paths(run)
    files = {"data.train": run.data.train, "data.dev": run.data.dev}
    for file in files.values():
        check_source(file)
    limits = Limits(run.data.max_length, run.data.max_prompt_length, run.data.bos)
    student = check.Side("student", load_tokenizer(run.student.path, "student.path", run.student.trust_remote_code))
    teacher = None
    if run.teacher is not None and run.method.teacher != "none":
        teacher = check.Side("teacher", load_tokenizer(run.teacher.path, "teacher.path", run.teacher.trust_remote_code))
    splits = {key: read_records(lines_of(file, student.tokenizer, run.cache_folder)) for key, file in files.items()}
    keys = {key: [check.prompt_key(record.prompt) for record in records] for key, records in splits.items()}
    for key, records in splits.items():
        again = check.repeated(keys[key])
        print(f"{key}: {len(records)} records of {files[key]}; {named(again)} with a prompt that stands before it too")
    leaked = check.repeated(keys["data.dev"], keys["data.train"])
    print(f"data.dev: {named(leaked)} with a prompt that is in data.train too")
    looked_at = {key: [records[i] for i in check.spread(len(records), most)] for key, records in splits.items()}
    show_lengths(looked_at, [student] if teacher is None else [student, teacher], limits)
    if teacher is not None and teacher.tokenizer.get_vocab() != student.tokenizer.get_vocab():
        show_coverage(looked_at["data.train"], student, teacher)
    for place in range(EXAMPLES):
        index = place * (len(splits["data.train"]) - 1) // (EXAMPLES - 1)
        for side in (student, teacher):
            if side is not None:
                counted, prompt, response = check.example(splits["data.train"][index], side, limits)
                print(f"\ndata.train, record {index}; {counted}\n{prompt}{response}")
    prompts = [record.prompt for records in looked_at.values() for record in records]
    for warning in check.warnings(student, teacher, prompts, run.data.bos):
        print(f"\nwarning: {warning}")


def named(indices: Sequence[int]) -> str:
    """How many records, and which."""
    if not indices:
        return "no record"
    more = ", ..." if len(indices) > MOST_NAMED else ""
    return f"{len(indices)} records ({', '.join(map(str, indices[:MOST_NAMED]))}{more})"


def show_lengths(looked_at: "Mapping[str, Sequence[Record]]", sides: "Sequence[Side]", limits: "Limits") -> None:
    """A row for prompts and one for responses of each split and side: a histogram, and how many are cut."""
    from dskd.data.check import EDGES, histogram
    from dskd.data.tokenization import cut_of, whole_lengths

    bins = [*(f"<={edge}" for edge in EDGES), "more"]
    table = Table("split", "side", "tokens of", *bins, "mean", "longest", "cut", box=None, header_style="bold")
    for key, records in looked_at.items():
        for side in sides:
            lengths = [whole_lengths(side.tokenizer, record) for record in records]
            parts, cuts = zip(*lengths, strict=True), cut_of(lengths, limits)
            for name, part, cut in zip(("prompt", "response"), parts, cuts, strict=True):
                counts = [str(count or "") for count in histogram(part)]
                numbers = f"{sum(part) / len(part):.1f}", str(max(part)), str(cut)
                table.add_row(key, side.name, name, *counts, *numbers)
    print()
    show(table, 160)
    counted = ", ".join(f"{len(records)} of {key}" for key, records in looked_at.items())
    print(f"records looked at: {counted}; cut: prompts lose their beginning, responses their end (EOS is counted)")


def show_coverage(records: "Sequence[Record]", student: "Side", teacher: "Side") -> None:
    from dskd.data.check import coverage

    found = coverage(records, student.tokenizer, teacher.tokenizer)
    shares = [100 * found.pairs / max(1, count) for count in (found.student, found.teacher)]
    print(
        f"alignment: {shares[0]:.1f} % of the student's response tokens and {shares[1]:.1f} % of the teacher's stand "
        "for the same bytes as one of the other side"
    )
