"""Models of the Hugging Face hub that were downloaded before, by their name org/model. No network is used."""

import os
import re
from pathlib import Path

NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
REVISION = re.compile(r"[\w.-]+", re.ASCII)


def cache_folder() -> Path:
    """Where `hf download` puts models; the variables are those that huggingface_hub reads."""
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or f"{caches}/huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or f"{home}/hub").expanduser()


def find_model(path: Path) -> Path:
    """The folder of a model: `path` itself or, where it is not there and is such a name, the one in the hub's cache."""
    name = hub_name(path)
    return path if name is None or path.exists() else downloaded(name) or path


def hub_name(path: Path) -> str | None:
    """org/model where a path, as typed or made absolute, could be such a name."""
    here = Path.cwd()
    typed = str(path.relative_to(here) if path.is_absolute() and path.is_relative_to(here) else path)
    return typed if NAME.fullmatch(typed) else None


def downloaded(name: str) -> Path | None:
    """The snapshot of a model's main branch."""
    folder = cache_folder() / f"models--{name.replace('/', '--')}"
    try:
        revision = (folder / "refs" / "main").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None
    snapshot = folder / "snapshots" / revision
    return snapshot if REVISION.fullmatch(revision) and snapshot.is_dir() else None


def model_name(folder: Path) -> str:
    """What a model is called by its folder: a snapshot has the name of its model, not of its revision."""
    if folder.parent.name == "snapshots" and folder.parents[1].name.startswith("models--"):
        return folder.parents[1].name.rpartition("--")[2]
    return folder.name
