"""`dskd report`: runs to one page and the same as Markdown."""

import sys
from collections.abc import Sequence
from pathlib import Path

from dskd.config.errors import UserError, require
from dskd.report import page
from dskd.report.content import build
from dskd.report.markdown import MARK, markdown
from dskd.report.published import COMPARED
from dskd.report.runs import find_baselines, grouped, load, load_model
from dskd.rundir.collect import runs_among
from dskd.rundir.files import as_user_error, write_text


def write_report(
    directories: Sequence[Path], out: Path, baseline: str | None, compare: str | None
) -> tuple[Path, Path]:
    """Write the page to `out` and the Markdown beside it; returns both.

    Raises:
        UserError: where there is no run, a file of one is damaged, or another file would be overwritten.
    """
    allowed = ", ".join(COMPARED)
    require(compare is None or compare in COMPARED, "--compare", f"allowed: {allowed}; got {compare!r}")
    require(out.suffix in (".html", ".htm"), "--out", f"a name that ends in .html is expected, got {out}")
    beside = out.with_suffix(".md")
    for file, mark in ((out, page.MARK), (beside, MARK)):
        refuse_other(file, mark)
    runs, others = runs_among(directories)
    found = {path: load_model(path) for path in others}
    skipped = [str(path) for path, model in found.items() if model is None]
    if skipped:
        print(f"skipped, no run (no run.yaml in it) and no evaluations: {', '.join(skipped)}", file=sys.stderr)
    groups = grouped([load(run) for run in dict.fromkeys(run.resolve() for run in runs)])
    baselines = find_baselines(groups, baseline)
    groups.sort(key=lambda group: group.label in baselines)  # the baselines themselves first
    models = [model for model in found.values() if model is not None]
    document = build(groups, baselines, COMPARED[compare] if compare else (), models)
    with as_user_error(out, "--out"):
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, page.page(document))
        write_text(beside, markdown(document))
    return out, beside


def refuse_other(file: Path, mark: str) -> None:
    """Raise `UserError` where a file is there that is no report."""
    if not file.exists():
        return
    try:
        with file.open(encoding="utf-8", errors="replace") as text:
            found = mark in text.read(2000)
    except OSError as error:
        raise UserError(f"--out: {file} cannot be read: {error.strerror}") from None
    require(found, "--out", f"{file} is there and is no report; choose another name")
