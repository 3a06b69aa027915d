"""What a report shows of groups of runs: from scores, settings and curves to tables, charts and examples."""

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean

from dskd.config.changes import HARMLESS
from dskd.config.errors import one_line
from dskd.report.curves import curve_figures
from dskd.report.document import Block, Cell, Document, Example, Section, Table
from dskd.report.nearness import NEARNESS_TEXT, nearness
from dskd.report.published import Published
from dskd.report.runs import SEED, Group, Run, Scored, student_of, teacher_of
from dskd.report.statistics import RESAMPLES, Comparison, Summary, average, paired_bootstrap, summarize

METRICS = {"rougel": "ROUGE-L", "exact_match": "Exact match", "judge": "Judge, 1 to 10"}
"""Those of answers; others come after them, by their own names."""
AVERAGE = "average"
LONGEST_TEXT = 700
"""Characters of a prompt or an answer."""


def build(
    groups: Sequence[Group],
    baselines: Mapping[str, Group],
    published: Sequence[Published] = (),
    models: Sequence[Scored] = (),
) -> Document:
    """Everything of a report.

    Args:
        baselines: for the label of a group the one that it is compared with.
        published: averages to be shown beside.
        models: others whose scores are shown too, such as the teacher's.
    """
    rows = [*models, *groups]
    sets = sorted({name for row in rows for found in row.sets for name in found})
    answered = [name for name in sets if any(row.scores("rougel", name) for row in rows)]
    sections = [
        Section("Scores", SCORES_TEXT, list(score_tables(groups, models, sets))),
        Section("Against the baseline", BASELINE_TEXT, list(comparison_tables(groups, baselines, answered))),
        Section("Published averages", PUBLISHED_TEXT, list(published_table(groups, answered, published))),
        Section("Nearness to the teacher", NEARNESS_TEXT, list(nearness(groups))),
        Section("Runs", [], [runs_table(groups), *restarts_table(groups)]),
        Section("Curves", CURVES_TEXT, list(curve_figures(groups))),
        Section("Settings that differ", [], list(differing_settings(groups))),
        Section("Example answers", EXAMPLES_TEXT, list(examples(rows, answered))),
    ]
    runs = sum(len(group.runs) for group in groups)
    text = [f"{runs} runs in {len(groups)} groups; a group is the runs that differ only in {SEED}."]
    if not sets:
        text.append("No evaluation of these runs is finished yet: dskd evaluate RUN_DIR --data FILE makes one.")
    text += verdict(groups, baselines, answered)
    return Document("Distillation report", text, [section for section in sections if section.blocks])


SCORES_TEXT = (
    "Mean and deviation over training and sampling seeds; best of each column in bold. In small: the deviation over "
    "the training seeds' means, and over the sampling seeds of one training.",
)
BASELINE_TEXT = (
    "Difference of ROUGE-L to the baseline on the same records, and its 95 % interval by a paired bootstrap over "
    f"records ({RESAMPLES} resamples of each record's mean over all seeds); in bold where the interval leaves out 0. "
    "The interval knows nothing of other training seeds: for these, the last column tells how many deviations over all "
    "seeds, those of both groups pooled, the averages are apart.",
)
PUBLISHED_TEXT = (
    "Average ROUGE-L, beside published averages. They are of the models and sets that their column names, and compare "
    "with nothing else.",
)
CURVES_TEXT = (
    "One line for each run, the same style for the seeds of a group; long curves are means over neighbouring steps. "
    "A triangle marks a step after which the run was started again.",
)
EXAMPLES_TEXT = ("Of the first training seed and the first sampling seed; records are taken from all over each set.",)


def number(value: float) -> str:
    return f"{value:.2f}"


def score_tables(groups: Sequence[Group], models: Sequence[Scored], sets: Sequence[str]) -> Iterator[Table]:
    """One for each metric: models and groups x sets, and their average where there are several."""
    rows = [*models, *groups]
    found = {metric for row in rows for own in row.sets for each in own.values() for metric in each.by_seed}
    for metric in [*(m for m in METRICS if m in found), *sorted(found - set(METRICS))]:
        names = [name for name in sets if any(row.scores(metric, name) for row in rows)]
        columns = [[summarize(row.scores(metric, name)) for row in rows] for name in names]
        if len(names) > 1:
            columns.append([summarize(average_scores(row, metric, names)) for row in rows])
        cells = [score_cells(column, len(models)) for column in columns]
        lines = [
            [Cell(row.label), Cell(seeds_of(row, metric, names)), *(column[i] for column in cells)]
            for i, row in enumerate(rows)
        ]
        head = [METRICS.get(metric, one_line(metric, 60)), "seeds", *names, *[AVERAGE][: len(names) > 1]]
        yield Table(head, lines)


def average_scores(row: Scored, metric: str, sets: Sequence[str]) -> dict[tuple[int, int], float]:
    return average([row.scores(metric, name) for name in sets])


def score_cells(column: Sequence[Summary | None], models: int) -> list[Cell]:
    """The best is in bold where they differ; the first so many rows do not take part."""
    means = {each.mean for each in column[models:] if each is not None}
    best = max(means) if len(means) > 1 else None
    return [
        Cell("–") if each is None else score_cell(each, i >= models and each.mean == best)
        for i, each in enumerate(column)
    ]


def score_cell(summary: Summary, best: bool) -> Cell:
    text = number(summary.mean) + ("" if summary.deviation is None else f" ± {number(summary.deviation)}")
    both = summary.training is not None and summary.sampling is not None
    detail = f"training {number(summary.training or 0)}, sampling {number(summary.sampling or 0)}" if both else ""
    return Cell(text, detail, best)


def seeds_of(row: Scored, metric: str, sets: Sequence[str]) -> str:
    """How many trainings, and how many samplings of each, stand behind a row."""
    keys = {key for name in sets for key in row.scores(metric, name)}
    if not keys:
        return "–"
    runs = {run for run, _ in keys}
    sampled = {sum(run == own for own, _ in keys) for run in runs}
    return f"{len(runs)} × {'–'.join(map(str, sorted(sampled)))}"


def comparison_tables(groups: Sequence[Group], baselines: Mapping[str, Group], sets: Sequence[str]) -> Iterator[Table]:
    """Groups x sets: difference to the baseline with its interval."""
    rows = []
    for group in groups:
        baseline = baselines.get(group.label)
        if baseline is not None:
            found = [comparison_cell(group, baseline, name) for name in sets]
            if any(cell.text != "–" for cell in found):
                rows.append([Cell(f"{group.label} − {baseline.label}"), *found, in_deviations(group, baseline, sets)])
    if rows:
        yield Table(["ROUGE-L", *sets, AVERAGE], rows)


def comparison_cell(group: Group, baseline: Group, name: str) -> Cell:
    """A dash where the two were not scored on the same records."""
    found = compared(group, baseline, name)
    if found is None:
        return Cell("–")
    return Cell(f"{found.difference:+.2f}", f"{found.low:+.2f} to {found.high:+.2f}", found.is_clear)


def compared(group: Group, baseline: Group, name: str) -> Comparison | None:
    own, other = group.by_record(name), baseline.by_record(name)
    if not own or own.keys() != other.keys():
        return None
    return paired_bootstrap([own[key] - other[key] for key in own])


def in_deviations(group: Group, baseline: Group, sets: Sequence[str]) -> Cell:
    """Difference of the averages, and how many pooled deviations that is."""
    own, other = overall(group, sets), overall(baseline, sets)
    if own is None or other is None:
        return Cell("–")
    difference = own.mean - other.mean
    if not own.deviation or not other.deviation:
        return Cell(f"{difference:+.2f}")
    pooled = math.sqrt(fmean([own.deviation**2, other.deviation**2]))
    return Cell(f"{difference:+.2f}", f"{abs(difference) / pooled:.1f} deviations")


def verdict(groups: Sequence[Group], baselines: Mapping[str, Group], sets: Sequence[str]) -> Iterator[str]:
    """The best group in one sentence."""
    found = [(summary.mean, i) for i, group in enumerate(groups) if (summary := overall(group, sets)) is not None]
    if not found:
        return
    mean, best = max(found)
    where = f"over {len(sets)} sets" if len(sets) > 1 else f"on {sets[0]}"
    text = f"Highest ROUGE-L {where}: {groups[best].label} with {number(mean)}"
    base = baselines.get(groups[best].label)
    if base is not None and (other := overall(base, sets)) is not None:
        text += f", {mean - other.mean:+.2f} beside {base.label}"
    yield f"{text}."


def overall(group: Group, sets: Sequence[str]) -> Summary | None:
    return summarize(average_scores(group, "rougel", sets))


def published_table(groups: Sequence[Group], sets: Sequence[str], published: Sequence[Published]) -> Iterator[Table]:
    if not published:
        return
    rows = []
    for group in groups:
        own = overall(group, sets)
        pair = f"{teacher_of(group.runs[0])} to {student_of(group.runs[0])}".removeprefix("from ").strip()
        theirs = [each.rougel.get(group.config.method.kind) for each in published]
        rows.append(
            [Cell(group.label, pair), score_cell(own, False) if own else Cell("–"), *map(published_cell, theirs)]
        )
    shown = {group.config.method.kind for group in groups}
    for name in sorted({name for each in published for name in each.rougel} - shown):
        rows.append([Cell(name), Cell(""), *(published_cell(each.rougel.get(name)) for each in published)])
    columns = [f"{each.pair}, {each.sets} sets ({each.source})" for each in published]
    yield Table(["ROUGE-L, average", f"here, {len(sets)} sets", *columns], rows)


def published_cell(value: float | None) -> Cell:
    return Cell("" if value is None else number(value))


def runs_table(groups: Sequence[Group]) -> Table:
    """One row a run; columns that are empty in all of them are left out."""
    head = ["run", "group", "steps", "dev loss", "dev accuracy", "dev ROUGE-L", "tokens/s", "GiB", "restarts"]
    rows = [run_row(run, group) for group in groups for run in group.runs]
    kept = [i for i in range(len(head)) if any(row[i].text for row in rows)]
    return Table([head[i] for i in kept], [[row[i] for i in kept] for row in rows])


def run_row(run: Run, group: Group) -> list[Cell]:
    best = min(run.evaluations, key=lambda line: finite(line.get("dev_loss")) or math.inf, default={})
    loss, accuracy, rougel = (finite(best.get(name)) for name in ("dev_loss", "dev_accuracy", "dev_rougel"))
    speeds = sorted(v for step in run.steps if (v := finite(step.get("tokens_per_second"))) is not None)
    memory = [v for step in run.steps if (v := finite(step.get("gpu_gib"))) is not None]
    texts = [
        str(run.steps[-1]["step"]) if run.steps else "0",
        "" if loss is None else f"{loss:.4f}",
        "" if accuracy is None else f"{100 * accuracy:.1f} %",
        "" if rougel is None else number(rougel),
        f"{speeds[len(speeds) // 2]:,.0f}" if speeds else "",
        f"{max(memory):.1f}" if memory else "",
        str(len(run.restarts)),
    ]
    return [Cell(run.name), Cell(group.label, f"seed {run.config.train.seed}"), *map(Cell, texts)]


def finite(value: object) -> float | None:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def restarts_table(groups: Sequence[Group]) -> Iterator[Table]:
    runs = [run for group in groups for run in group.runs if run.restarts]
    rows = [
        [Cell(run.name), Cell(str(step)), Cell(reason or "–")] for run in runs for step, reason in run.restarts.items()
    ]
    if rows:
        yield Table(["restarted run", "after step", "why"], rows)


def differing_settings(groups: Sequence[Group]) -> Iterator[Table]:
    """Keys whose values are not the same in all runs, and versions of packages; those that change no result last."""
    runs = [run for group in groups for run in group.runs]
    keys = list(dict.fromkeys(key for run in runs for key in run.settings))
    differing = [key for key in keys if len({repr(run.settings.get(key)) for run in runs}) > 1]
    differing.sort(key=lambda key: key.startswith(HARMLESS))
    rows = [[Cell(key), *(values(group, key) for group in groups)] for key in differing]
    names = list(dict.fromkeys(name for run in runs for name in run.versions))
    for name in names:
        if len({run.versions.get(name) for run in runs}) > 1:
            own = [" · ".join(dict.fromkeys(run.versions.get(name, "") for run in group.runs)) for group in groups]
            rows.append([Cell(f"version: {name}"), *map(Cell, own)])
    if rows:
        yield Table(["setting", *(group.label for group in groups)], rows)


def values(group: Group, key: str) -> Cell:
    """The values of a setting in a group's runs, each once; – where the method has no such setting."""
    found = ["–" if key not in run.settings else str(run.settings[key]) for run in group.runs]
    return Cell(one_line(" · ".join(dict.fromkeys(found)), 120))


def examples(rows: Sequence[Scored], sets: Sequence[str]) -> Iterator[Block]:
    """The same records, answered by each model, and by the first run of each group, that has them."""
    for name in sets:
        scored = [(row, row.sets[0][name]) for row in rows if name in row.sets[0]]
        keys = sorted({key for _, scores in scored for key in scores.examples})
        for key in keys:
            found = [(row.label, scores.examples[key]) for row, scores in scored if key in scores.examples]
            first = found[0][1]
            answers = [(label, number(answer.rougel), one_text(answer.answer)) for label, answer in found]
            title = f"{name}, record {key[0]}"
            yield Example(title, one_text(first.prompt), [one_text(text) for text in first.references], answers)


def one_text(text: str) -> str:
    """A text without its middle where it is very long; line breaks stay."""
    if len(text) <= LONGEST_TEXT:
        return text
    return f"{text[: 2 * LONGEST_TEXT // 3]} ... {text[-LONGEST_TEXT // 3 :]}"
