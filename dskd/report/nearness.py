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

BEFORE = -1
"""The style of what no run has trained: grey."""


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
    yield Figures([RangeChart(title, list(ranges(found, title))) for title in titles])


def ranges(found: Sequence[tuple[Group, int, Run, Analysis]], title: str) -> Iterator[Range]:
    """One measure: each student as it was, once, and as each run left it."""
    seen: set[str] = set()
    for group, style, run, analysis in found:
        earlier, now = measure(analysis.before, title), measure(analysis.after, title)
        name = f"before: {student_of(run)}"
        if earlier is not None and name not in seen:
            seen.add(name)
            yield Range(name, BEFORE, earlier.low, earlier.middle, earlier.high)
        if now is not None:
            yield Range(label_of(group, run), style, now.low, now.middle, now.high)


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
