"""What `dskd analyze` found, as a table and as charts: each run's student before and after."""

from collections.abc import Iterator, Sequence

from dskd.report.document import Block, Cell, Figures, Range, RangeChart, Table
from dskd.report.runs import Group, Run, student_of
from dskd.rundir.analysis import Analysis, Compared, Spread

NEARNESS_TEXT = (
    "Distances between the student and the teacher, mean over records; smaller is nearer. Structure: how like the last "
    "hidden states of a record's tokens are to each other, as cosines and as inner products, in both models. "
    "Divergences are of the next token's distributions, in nats, where both models share a vocabulary. In the charts, "
    "a dot is the median over records, and a bar holds the middle half of them.",
)


def nearness(groups: Sequence[Group]) -> Iterator[Block]:
    """Nothing where no run was analyzed."""
    found = [
        (group, style, run, run.analysis)
        for style, group in enumerate(groups)
        for run in group.runs
        if run.analysis is not None
    ]
    titles = list(dict.fromkeys(title for *_, analysis in found for title in analysis.after.measures()))
    if not found:
        return
    rows = [
        [Cell(label_of(group, run), records_of(analysis)), *(change(analysis, title) for title in titles)]
        for group, _, run, analysis in found
    ]
    yield Table(["before → after", *titles], rows)
    charts = []
    for title in titles:
        ranges: dict[str, Range] = {}
        for group, style, run, analysis in found:
            for label, compared in (
                (f"before: {student_of(run)}", analysis.before),
                (label_of(group, run), analysis.after),
            ):
                spread = measure(compared, title)
                if spread is not None:
                    ranges.setdefault(label, Range(label, style, spread.low, spread.middle, spread.high))
        charts.append(RangeChart(title, list(ranges.values())))
    yield Figures(charts)


def label_of(group: Group, run: Run) -> str:
    return f"{group.label}, seed {run.config.train.seed}"


def records_of(analysis: Analysis) -> str:
    tokens = "aligned tokens" if analysis.aligned else "tokens"
    return f"{analysis.records} records, {analysis.tokens} {tokens}"


def change(analysis: Analysis, title: str) -> Cell:
    before, after = measure(analysis.before, title), measure(analysis.after, title)
    if after is None:
        return Cell("–")
    return Cell(f"{after.mean:.4f}" if before is None else f"{before.mean:.4f} → {after.mean:.4f}")


def measure(compared: Compared | None, title: str) -> Spread | None:
    return None if compared is None else compared.measures().get(title)
