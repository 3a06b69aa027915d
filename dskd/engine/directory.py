"""The run directory: made once, gone on with only by the same run, cleaned of what a killed process left."""

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from dskd import __version__
from dskd.config.changes import changed, harmful
from dskd.config.errors import UserError
from dskd.config.load import load_run, to_plain, to_yaml
from dskd.config.run import BEST, RunConfig
from dskd.engine.checkpoint import Saved
from dskd.engine.files import MODEL_NAME, as_user_error, write_text
from dskd.engine.metrics import LOG

NOT_A_RUN = {"job", "eval", ".lock"}
"""What may be in the directory of a run that has not begun."""
PACKAGES = ("torch", "deepspeed", "transformers", "peft", "tokenizers", "safetensors")


def write_settings(run: RunConfig) -> None:
    """Write what runs into the run directory: run.yaml (resolved) and args.json (with versions)."""
    directory = run.directory
    with as_user_error(directory):
        directory.mkdir(parents=True, exist_ok=True)
        write_text(directory / "run.yaml", to_yaml(run))
        write_text(directory / "args.json", json.dumps(describe(run), indent=2) + "\n")


def changes(run: RunConfig, force: bool) -> dict[str, str] | None:
    """Settings that differ from those of the run that the directory holds; None where it holds none yet.

    Raises:
        UserError: where it holds something else, or this would be another run and `force` is off.
    """
    directory = run.directory
    if not directory.is_dir() or all(p.name in NOT_A_RUN for p in directory.iterdir()):
        return None
    if not (directory / "run.yaml").is_file():
        raise UserError(f"output.name: {directory} holds something that is no run; choose another output.name")
    found = changed(load_run(directory / "run.yaml"), run)
    refused = harmful(found)
    if refused and not force:
        told = "; ".join(f"{key}: {change}" for key, change in refused.items())
        raise UserError(
            f"output.name: {directory} already holds a run with other settings ({told}); choose another output.name, "
            "or --force to go on with these"
        )
    return found


def clean(directory: Path) -> None:
    """Remove what a killed process left half done. Only the process that holds the lock may."""
    for pattern in (".epoch*", ".run.yaml.*", ".args.json.*", "resume/.step*", "resume/.LATEST.*"):
        for left in directory.glob(pattern):
            shutil.rmtree(left) if left.is_dir() else left.unlink()


def keep_models(directory: Path, kept: tuple[Saved, ...]) -> None:
    """Delete the saved models that are not among `kept`, best first; `best` links to the first one."""
    if kept:
        link = directory / f".{BEST}"
        link.unlink(missing_ok=True)
        link.symlink_to(kept[0].folder.name)
        if (directory / BEST).is_dir() and not (directory / BEST).is_symlink():
            shutil.rmtree(directory / BEST)  # the run was copied with its links followed: a second copy of a model
        link.replace(directory / BEST)
    names = {saved.folder.name for saved in kept}
    for folder in directory.glob("epoch*_step*"):
        if MODEL_NAME.fullmatch(folder.name) and folder.name not in names:
            shutil.rmtree(folder)


def cut_metrics(directory: Path, length: int) -> None:
    """Cut metrics.jsonl to what it held when the state was saved; what is after that will come again."""
    file = directory / "metrics.jsonl"
    if not file.is_file():
        return
    with as_user_error(file), file.open("r+b") as metrics:
        content = metrics.read()
        whole = content[:length].rfind(b"\n") + 1
        if whole < length:
            LOG.warning(f"{file} ends before the state's step: {length - whole} bytes of it are lost")
        if whole < len(content):
            metrics.truncate(whole)
            os.fsync(metrics.fileno())


def describe(run: RunConfig) -> dict[str, Any]:
    return {
        "run": to_plain(run),
        "command": sys.argv,
        "dskd": __version__,
        "git": git_revision(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def git_revision() -> str | None:
    """Revision of the source that runs: that of its git checkout, or the one that an image was built from."""
    here = Path(__file__).parent
    with suppress(OSError):
        found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
        if found.stdout.strip():
            return found.stdout.strip()
    return os.environ.get("DSKD_REVISION")
