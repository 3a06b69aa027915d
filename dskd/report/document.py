"""A report before it is a page or a text: sections of tables, charts and examples. Both are written from it."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Cell:
    text: str = ""
    detail: str = ""
    """In small, below."""
    bold: bool = False


@dataclass(frozen=True)
class Table:
    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    """The first cell of each names it."""


@dataclass(frozen=True)
class Line:
    """One run in a chart."""

    label: str
    style: int
    """Which colour and dashes; the runs of a group have the same."""
    points: Sequence[tuple[float, float]]
    restarts: Sequence[float] = ()
    """Where the run was started again."""


@dataclass(frozen=True)
class Chart:
    """Lines over steps."""

    title: str
    lines: Sequence[Line]
    log: bool = False
    """The vertical axis is logarithmic."""
    dots: bool = False
    """Each point counts, so that it is drawn."""


@dataclass(frozen=True)
class Range:
    """A distribution as its quartiles, and its mean."""

    label: str
    style: int
    low: float
    middle: float
    high: float


@dataclass(frozen=True)
class RangeChart:
    title: str
    ranges: Sequence[Range]


@dataclass(frozen=True)
class Figures:
    """Charts of the same groups, side by side."""

    charts: Sequence[Chart | RangeChart]
    legend: Sequence[tuple[str, int]] = ()
    """Each group with its style."""


@dataclass(frozen=True)
class Example:
    """One question, and what each group answers."""

    title: str
    prompt: str
    references: Sequence[str]
    answers: Sequence[tuple[str, str, str]]
    """Group, score, answer."""


Block = Table | Figures | Example


@dataclass(frozen=True)
class Section:
    title: str
    text: Sequence[str]
    """Paragraphs before the blocks."""
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Document:
    title: str
    text: Sequence[str]
    sections: Sequence[Section]
