"""The core's side of a run directory: made once, gone on with only by the same run, cleaned of what a kill left."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dskd import __version__
from dskd.config.changes import LENGTH, changed, harmful, is_longer
from dskd.config.errors import UserError
from dskd.config.load import load_run, to_plain, to_yaml
from dskd.config.run import RunConfig
from dskd.engine.metrics import LOG
from dskd.rundir.content import as_kept, contents, differences, read_contents
from dskd.rundir.files import as_user_error, read_json, write_json, write_text
from dskd.rundir.layout import RunDirectory
from dskd.rundir.read import RunLength, known_length
from dskd.rundir.train_state import TrainState

PACKAGES = ("torch", "deepspeed", "transformers", "peft", "tokenizers", "safetensors")


def write_settings(run: RunConfig, length: RunLength) -> list[str]:
    """Write what runs into the run directory: run.yaml (resolved) and args.json (with versions and sums).

    Returns for the log which versions differ from those of the start before, and whether the length does.
    """
    directory, now = RunDirectory.of(run), provenance(run)
    with as_user_error(directory.path):
        directory.path.mkdir(parents=True, exist_ok=True)
        try:
            before = read_json(directory.args) or {}
        except UserError:  # it is only told, and written anew
            before = {}
        length_before = known_length(directory)
        write_text(directory.settings, to_yaml(run))
        write_json(directory.args, now | {"length": asdict(length), "content": as_kept(contents(run))})
    notes = []
    if length_before is not None and length_before.total_steps != length.total_steps:
        steps = f"{length.total_steps} steps instead of {length_before.total_steps}"
        notes.append(f"{steps}; the learning rates follow the new length from here on")
    old, new = versions(before), versions(now)
    return notes + [
        f"{name}: {old[name]} -> {new[name]} since the last start"
        for name in new
        if old.get(name, new[name]) != new[name]
    ]


def versions(provenance: dict[str, Any]) -> dict[str, str]:
    """Everything in args.json that says which code ran."""
    packages = provenance.get("versions")
    own = {name: provenance.get(name) for name in ("dskd", "git", "python")}
    found = own | (packages if isinstance(packages, dict) else {})
    return {name: str(version) for name, version in found.items() if version is not None}


def provenance(run: RunConfig) -> dict[str, Any]:
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


def changes(run: RunConfig, force: bool) -> dict[str, str] | None:
    """Settings and contents that differ from those of the run that the directory holds; None where it holds none yet.

    Raises:
        UserError: where it holds something else, or this would be another run and `force` is off.
    """
    directory = RunDirectory.of(run)
    if not directory.has_begun():
        return None
    if not directory.settings.is_file():
        raise UserError(f"output.name: {directory.path} holds something that is no run; choose another output.name")
    before = load_run(directory.settings)
    found = changed(before, run)
    for key, other in differences(read_contents(directory), contents(run)).items():
        if other is None:
            found.pop(key, None)  # it lies elsewhere, and is the same
        else:
            found[key] = other
    grown = LENGTH if is_longer(before.train, run.train) else ()
    refused = {key: change for key, change in harmful(found).items() if key not in grown}
    if refused and not force:
        told = "; ".join(f"{key}: {change}" for key, change in refused.items())
        raise UserError(
            f"output.name: {directory.path} already holds a run with other settings ({told}); choose another "
            "output.name, or --force to go on with these"
        )
    return found


def clean(directory: RunDirectory) -> None:
    """Remove what a killed process left half done. Only the process that holds the lock may."""
    for left in directory.unfinished():
        shutil.rmtree(left) if left.is_dir() else left.unlink()


def before_evaluation(directory: RunDirectory, state: TrainState) -> int:
    """Length of metrics.jsonl without the line of the evaluation after `state.step`, where that is its last one."""
    with suppress(OSError):
        whole = directory.metrics.read_bytes()[: state.metrics_bytes]
        last = whole.rstrip(b"\n").rfind(b"\n") + 1
        if b'"dev_loss"' in whole[last:]:
            return last
    return state.metrics_bytes


def cut_metrics(directory: RunDirectory, length: int) -> None:
    """Cut metrics.jsonl to what it held when the state was saved; what is after that will come again."""
    file = directory.metrics
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
