"""What the verbs that list or count print; tables are as wide as the terminal, or whole where there is none."""

import sys
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path

from rich.console import Console
from rich.table import Column, Table

from dskd.config.cluster import ClusterConfig
from dskd.config.errors import UserError
from dskd.config.hub import find_model
from dskd.config.recipes import find_recipes
from dskd.config.run import RunConfig, check_folder, require_folder
from dskd.config.settings import list_settings
from dskd.rundir.collect import collect, runs_among


def show_collected(run_directories: Sequence[Path], to: Path) -> None:
    """`dskd collect`."""
    runs, others = runs_among(run_directories)
    if others:
        print(f"skipped, no run (no run.yaml in it): {', '.join(map(str, others))}", file=sys.stderr)
    table = Table("model", "step", "dev loss", "ROUGE-L", "MB", box=None, pad_edge=False, header_style="bold")
    for model in collect(runs, to):
        rougel = "" if model.rougel is None else f"{model.rougel:.2f}"
        table.add_row(model.folder, str(model.step), f"{model.dev_loss:.4f}", rougel, f"{model.size / 1e6:.1f}")
    show(table, 160)


def show_settings(prefix: str, search: str, cluster: bool) -> None:
    """`dskd settings`."""
    kind, word = ClusterConfig if cluster else RunConfig, search.casefold()
    chosen = list_settings(prefix, kind)
    found = [setting for setting in chosen if word in " ".join(astuple(setting)).casefold()]
    if chosen and not found:
        raise UserError(f"--search: no key has {search!r} in its name, type, default or help")
    if not chosen:
        areas = ", ".join(dict.fromkeys(s.key.partition(".")[0].partition("(")[0] for s in list_settings(kind=kind)))
        raise UserError(f"settings: no key begins with {prefix!r}; areas: {areas}")
    table = Table("key", "type", "default", "help", box=None, pad_edge=False, header_style="bold")
    for setting in found:
        table.add_row(setting.key, setting.type, setting.default, setting.help)
    show(table, 160)


def show_recipes(folder: Path | None) -> None:
    """`dskd recipes`."""
    terminal = sys.stdout.isatty()
    table = Table(
        Column("recipe", overflow="fold"),
        *("method", "student", "teacher"),
        Column("description", no_wrap=True, ratio=1 if terminal else None),  # what the terminal has left over
        box=None,
        pad_edge=False,
        header_style="bold",
        expand=terminal,
    )
    for recipe in find_recipes(folder):
        table.add_row(str(recipe.file), recipe.method, recipe.student, recipe.teacher, recipe.description)
    show(table, 1000)


def show(table: Table, width: int) -> None:
    """Print a table; `width`: columns where there is no terminal."""
    Console(width=None if sys.stdout.isatty() else width, markup=False, highlight=False).print(table)


def show_alignment(teacher: Path, student: Path, cache_dir: Path) -> None:
    """`dskd align`."""
    teacher, student = find_model(teacher), find_model(student)
    require_folder("TEACHER", teacher)
    require_folder("STUDENT", student)
    check_folder("--cache-dir", cache_dir)
    from dskd.data.vocabulary_map import load_or_build
    from dskd.engine.metrics import progress_bar
    from dskd.models.load import load_tokenizer

    tokenizers = load_tokenizer(teacher, "TEACHER"), load_tokenizer(student, "STUDENT")
    with progress_bar("vocabulary map") as progress:
        found = load_or_build(cache_dir, *tokenizers, progress)
    total = len(found.student_ids)
    for count, label in ((found.exact, "exactly"), (found.near, "nearly"), (found.none, "not at all")):
        print(f"{count:8d}  {100 * count / total:5.1f} %  match {label}")
    print(f"{total:8d}  teacher tokens; map kept in {cache_dir}")


def show_analysis(
    place: Path, teacher: Path | None, data: Path | None, records: int, lengths: tuple[int, int] | None, precision: str
) -> None:
    """`dskd analyze`."""
    if precision not in ("bf16", "fp32"):
        raise UserError(f"--precision: allowed: bf16, fp32; got {precision!r}")
    place = find_model(place).absolute()
    check_folder("MODEL", place)
    from dskd.analyze import analyze, best_device, task_of
    from dskd.engine.metrics import progress_bar
    from dskd.rundir.analysis import write_analysis
    from dskd.rundir.files import as_user_error
    from dskd.rundir.layout import analysis_of

    task = task_of(place, teacher, data, lengths, records)
    with progress_bar("records") as progress:
        found = analyze(task, precision, best_device(), progress)
    with as_user_error(analysis_of(place), "MODEL"):
        write_analysis(place, found)
    both = {"before": found.before, "after": found.after}
    rows = [(name, compared) for name, compared in both.items() if compared is not None]
    table = Table("student", *rows[0][1].measures(), box=None, pad_edge=False, header_style="bold")
    for name, compared in rows:
        table.add_row(name, *(f"{measure.mean:.4f}" for measure in compared.measures().values()))
    show(table, 160)
    which = "aligned tokens" if found.aligned else "tokens"
    print(f"distances to {found.teacher} over {found.tokens} {which} of {found.records} records: {analysis_of(place)}")
