"""The same report as Markdown: its tables and examples, without the charts."""

import re
from collections.abc import Iterator, Sequence

from dskd.report.document import Cell, Document, Example, Figures, Table
from dskd.report.escape import is_shown

MARK = "<!-- dskd report -->"
_SPECIAL = re.compile(r"([\\`*_\[\]|~<>&$])")
"""What means something within a line; texts of runs never begin one."""


def plain(text: str) -> str:
    """Any text on one line, as itself: what Markdown or HTML would take for more is escaped."""
    return _SPECIAL.sub(lambda found: f"&#{ord(found[1])};" if found[1] in "<>&|" else f"\\{found[1]}", joined(text))


def joined(text: str) -> str:
    return " ".join("".join(c if is_shown(c) else "\ufffd" for c in text).split())


def markdown(document: Document) -> str:
    return "\n".join([MARK, *lines(document)]) + "\n"


def lines(document: Document) -> Iterator[str]:
    yield from (f"# {plain(document.title)}", "")
    for text in document.text:
        yield from (plain(text), "")
    for section in document.sections:
        yield from (f"## {plain(section.title)}", "")
        for text in section.text:
            yield from (plain(text), "")
        for block in section.blocks:
            if isinstance(block, Table):
                yield from table(block.head, block.rows)
            elif isinstance(block, Figures):
                yield from (f"{len(block.charts)} charts are on the page beside this file.", "")
            else:
                yield from example(block)


def table(head: Sequence[str], rows: Sequence[Sequence[Cell]]) -> Iterator[str]:
    yield f"| {' | '.join(map(plain, head))} |"
    yield f"|{'---|' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(map(cell, row))} |"
    yield ""


def cell(found: Cell) -> str:
    text = f"**{plain(found.text)}**" if found.bold else plain(found.text)
    return f"{text} ({plain(found.detail)})" if found.detail else text


def example(found: Example) -> Iterator[str]:
    yield from (f"**{plain(found.title)}**", "")
    rows = [[Cell("prompt"), Cell(), Cell(found.prompt)]]
    rows += [[Cell("reference"), Cell(), Cell(text)] for text in found.references]
    rows += [[Cell(label), Cell(score), Cell(text)] for label, score, text in found.answers]
    yield from table(["", "ROUGE-L", "text"], rows)
