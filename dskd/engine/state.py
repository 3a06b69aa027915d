"""A run's state on disk: written whole by all ranks together, verified before it is used.

`resume/step900/` holds one safetensors file a rank (its pieces of weights and moments, its random generators),
`state.json` (where the run stands) and MANIFEST.json (sizes and sha256); `resume/LATEST` names the newest one. Nothing
in it is pickled: safetensors and JSON cannot run code. The sums tell damage, not origin; whoever can write into the run
directory can change what is trained.

The learning rates and the records of each step are functions of the step, and bf16 needs no loss scaler, so that
nothing is kept of them. The teacher and frozen weights are read from their own folders.
"""

import json
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from dskd import __version__
from dskd.config.errors import UserError
from dskd.engine import randomness
from dskd.engine.checkpoint import Saved, Scores
from dskd.engine.delivery import Delivery
from dskd.engine.distributed import Ranks
from dskd.engine.files import as_user_error, damage, entry, publish, read_manifest, sync_file, write_text
from dskd.engine.shards import load_pieces, read_notes, save_pieces

FOLDER, LATEST, STATE = "resume", "LATEST", "state.json"
FORMAT = 1
BEFORE = "-before-evaluation"
NAME = re.compile(rf"step(\d+)({BEFORE})?")


@dataclass(frozen=True)
class Progress:
    """Where a run stands."""

    step: int = 0
    """Optimizer steps done."""
    pending: bool = False
    """Whether an evaluation follows `step` that is not done."""
    best: tuple[Saved, ...] = ()
    """The saved models that are kept, best first."""
    metrics_bytes: int = 0
    """Length of metrics.jsonl."""
    finished: bool = False

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"best": [{"folder": s.folder.name, "scores": asdict(s.scores)} for s in self.best]}

    @classmethod
    def from_json(cls, values: dict[str, Any], directory: Path) -> "Progress":
        best = tuple(Saved(directory / s["folder"], Scores(**s["scores"])) for s in values["best"])
        return cls(values["step"], values["pending"], best, values["metrics_bytes"], values["finished"])


def folder_of(directory: Path, progress: Progress) -> Path:
    return directory / FOLDER / (f"step{progress.step}" + (BEFORE if progress.pending else ""))


def write(folder: Path, delivery: Delivery, engine: Any, ranks: Ranks) -> dict[str, Any]:
    """Write every rank's file into a folder beside `folder`, or on its way there; returns their sizes and sums.

    A collective call. Raises `UserError` on all ranks where one cannot write.
    """
    partial = partial_of(folder)
    ranks.together(lambda: clear(partial) if ranks.is_main else None)
    written = dict(ranks.together(lambda: write_rank(delivery.local(partial), engine, ranks)))
    name = f"rank{ranks.rank}.safetensors"
    delivery.file(partial / name, written[name])
    return written


def partial_of(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.partial")


def clear(partial: Path) -> None:
    """An empty folder."""
    with as_user_error(partial):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True, exist_ok=True)


def write_rank(partial: Path, engine: Any, ranks: Ranks) -> tuple[str, dict[str, Any]]:
    file = partial / f"rank{ranks.rank}.safetensors"
    with as_user_error(file):
        partial.mkdir(parents=True, exist_ok=True)
        save_pieces(engine, file, *randomness.capture(ranks.device))
        sync_file(file)
        return file.name, entry(file)


def complete(folder: Path, progress: Progress, written: dict[str, Any], keep_last: int) -> None:
    """Once every rank's file is there: publish the state, then LATEST, then delete older states. On the main rank."""
    partial = partial_of(folder)
    with as_user_error(folder):
        about = {"format": FORMAT, "dskd": __version__, "time": time.time(), "world_size": len(written)}
        write_text(partial / STATE, json.dumps(about | progress.to_json(), indent=2) + "\n")
        publish(partial, folder, written | {STATE: entry(partial / STATE)})
        write_text(folder.parent / LATEST, folder.name + "\n")
        for older in newest_first(folder.parent)[keep_last:]:
            shutil.rmtree(older)


def newest_first(states: Path) -> list[Path]:
    """The folders of published states."""
    named = [(NAME.fullmatch(path.name), path) for path in states.glob("step*")] if states.is_dir() else []
    found = [(int(name[1]), name[2] is None, path) for name, path in named if name]
    return [path for *_, path in sorted(found, reverse=True)]


def find(directory: Path, ranks: Ranks) -> tuple[Path | None, Progress, list[str]]:
    """The newest state that is whole, where the run stood, and what to tell of damaged ones. A collective call.

    The files are verified by all ranks together, each taking some. Without any state the run stands at its beginning.

    Raises:
        UserError: where there are states, but none is whole.
    """
    states = directory / FOLDER
    candidates, latest = ranks.gather((newest_first(states), read_latest(states)) if ranks.is_main else None)[0]
    notes = []
    if latest is not None and states / latest not in candidates:
        notes.append(f"{FOLDER}/{LATEST} names {latest!r}, which is not there")
    for folder in candidates:
        own = list(problems(folder, ranks.rank, ranks.world_size))
        found = [problem for part in ranks.gather(own) for problem in part]
        if not found:
            about = json.loads((folder / STATE).read_text(encoding="utf-8"))
            if about["format"] != FORMAT:
                raise UserError(f"{folder}: state format {about['format']} is not known to dskd {__version__}")
            return folder, Progress.from_json(about, directory), notes
        notes.append(f"state {folder} is damaged and not used: {found[0]}")
    if candidates:
        raise UserError(f"{states}: no state is whole: {notes[-1]}; without this folder the run begins anew")
    return None, Progress(), notes


def read_latest(states: Path) -> str | None:
    try:
        return (states / LATEST).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None


def problems(folder: Path, rank: int, world_size: int) -> Iterator[str]:
    """What is wrong with each damaged file among this rank's share of a state's files."""
    try:
        listed = read_manifest(folder)
    except ValueError as error:
        yield str(error)
        return
    if STATE not in listed:
        yield f"{STATE} is missing"
    for name, expected in list(listed.items())[rank::world_size]:
        problem = damage(folder / name, expected)
        if problem is not None:
            yield problem


def load(folder: Path, engine: Any, seed: int, ranks: Ranks) -> list[str]:
    """Give the engine and the random generators the state in `folder`, whatever number of ranks wrote it.

    Returns what the log should tell of it.
    """
    about = json.loads((folder / STATE).read_text(encoding="utf-8"))
    files = [folder / f"rank{rank}.safetensors" for rank in range(about["world_size"])]
    try:
        load_pieces(engine, files)
    except (ValueError, SafetensorError) as error:
        raise UserError(f"{folder}: the state does not fit this run: {error}") from None
    if about["world_size"] == ranks.world_size:
        with safe_open(files[ranks.rank], "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys() if key.startswith("rng:")}  # noqa: SIM118
            randomness.restore(tensors, read_notes(file), ranks.device)
        return []
    randomness.seed(abs(hash((seed, about["step"], ranks.rank))))
    return [f"{about['world_size']} rank(s) wrote the state, {ranks.world_size} go on: dropout is seeded anew"]
