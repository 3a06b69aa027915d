"""The run files that come with dskd: jobs/, one YAML a run; those that begin with _ are only there to be extended.

A pipeline that chains some of them may lie beside; it is no run.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dskd
from dskd.config.errors import UserError
from dskd.config.load import read_layers


@dataclass(frozen=True)
class Recipe:
    file: Path
    """Relative to the working directory where it lies below it."""
    method: str
    student: str
    """Name of the student's folder."""
    teacher: str
    """Name of the teacher's folder; empty without one."""
    description: str


def recipes_folder() -> Path:
    """jobs/ of the installed package, or of the checkout that it runs from."""
    package = Path(dskd.__file__).parent
    return next((f for f in (package / "jobs", package.parent / "jobs") if f.is_dir()), Path("jobs"))


def find_recipes(folder: Path | None = None) -> list[Recipe]:
    """All recipes under `folder`, by name. Raises `UserError` where it holds none or one cannot be read."""
    root = folder or recipes_folder()
    files = sorted(f for f in root.rglob("*.yaml") if not f.name.startswith("_"))
    found = [(file, read_layers(file)[0]) for file in files]
    runs = [recipe(file, values) for file, values in found if "stages" not in values]
    if not runs:
        raise UserError(f"recipes: no run files (*.yaml) under {root}")
    return runs


def recipe(file: Path, values: dict[str, Any]) -> Recipe:
    """A run file as a listing shows it; `values` are what it says, with what it extends."""
    here = Path.cwd()
    return Recipe(
        file=file.relative_to(here) if file.is_relative_to(here) else file,
        method=text(values, "method", "kind"),
        student=Path(text(values, "student", "path")).name,
        teacher=Path(text(values, "teacher", "path")).name,
        description=str(values.get("description", "")),
    )


def text(values: dict[str, Any], section: str, key: str) -> str:
    """The value of a key, or nothing: a listing shows a run file that would not run."""
    found = values.get(section)
    return str(found.get(key, "")) if isinstance(found, dict) else ""
