"""A run's state on disk: written whole by all ranks together, verified before it is used.

`resume/step900/` holds one safetensors file a rank (its pieces of weights and moments, its random generators),
`state.json` (where the run stands) and MANIFEST.json (sizes and sha256); `resume/LATEST` names the newest one. Nothing
in it is pickled: safetensors and JSON cannot run code. The sums tell damage, not origin; whoever can write into the run
directory can change what is trained.

The learning rates and the records of each step are functions of the step, and bf16 needs no loss scaler, so that
nothing is kept of them. The teacher and frozen weights are read from their own folders.
"""

import shutil
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from dskd import __version__
from dskd.checkpoint import randomness
from dskd.checkpoint.host_memory import HostMemory
from dskd.checkpoint.shards import load_pieces, pieces_file, read_notes
from dskd.checkpoint.staging import Staging
from dskd.config.errors import UserError
from dskd.engine.distributed import Ranks
from dskd.rundir.files import Manifest, as_user_error, damage, entry, publish, read_manifest, write_json, write_text
from dskd.rundir.layout import STATE, RunDirectory, beside, rank_file
from dskd.rundir.read import newest_state
from dskd.rundir.train_state import FORMAT, TrainState, read_state


def write(
    folder: Path, staging: Staging, memory: HostMemory | None, engine: Any, ranks: Ranks
) -> "futures.Future[Manifest]":
    """Begin to write every rank's file into a folder beside `folder`: the weights as they are now.

    A collective call. Returns what will be the size and sum of this rank's file.

    Args:
        memory: what the weights and moments are copied to; without it this returns once they are written.
    """
    partial = beside(folder, "partial")
    ranks.together(lambda: clear(partial) if ranks.is_main else None)
    copy: Callable[[Tensor], Tensor] = Tensor.detach
    if memory is not None:
        memory.begin()
        copy = memory.copy
    content = pieces_file(engine, copy, *randomness.capture(ranks.device))
    return staging.write(partial, {rank_file(partial, ranks.rank).name: content}, memory)


def clear(folder: Path) -> None:
    """An empty folder."""
    with as_user_error(folder):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)


def complete(directory: RunDirectory, state: TrainState, written: Manifest) -> None:
    """Once every rank's file is there: publish the state, then LATEST. On the main rank, in any thread."""
    folder = directory.state(state.name)
    partial = beside(folder, "partial")
    with as_user_error(folder):
        about = {"format": FORMAT, "dskd": __version__, "time": time.time(), "world_size": len(written)}
        write_json(partial / STATE, about | state.to_json())
        publish(partial, folder, {**written, STATE: entry(partial / STATE)})
        name_latest(directory, folder)


def name_latest(directory: RunDirectory, folder: Path) -> None:
    """Let LATEST name a state, whatever it holds now."""
    text = folder.name + "\n"
    with suppress(OSError, ValueError):
        if directory.latest.read_text(encoding="utf-8") == text:
            return
    write_text(directory.latest, text)


@dataclass(frozen=True)
class Found:
    """What is in a run directory to go on from."""

    folder: Path | None
    """The newest state that is whole; None begins at step 0."""
    state: TrainState
    """Where the run stood then."""
    damaged: tuple[Path, ...]
    """Newer states that are not whole."""
    notes: tuple[str, ...]
    """What the log should tell of it."""


def find(directory: RunDirectory, ranks: Ranks) -> Found:
    """Look for the newest state that is whole. A collective call.

    The files are verified by all ranks together, each taking some. Without any state the run stands at its beginning.

    Raises:
        UserError: where there are states, but none is whole.
    """
    seen = ([str(n) for n in directory.state_names()], why_latest_is_none(directory)) if ranks.is_main else None
    candidates, problem = ranks.gather(seen)[0]
    notes = [] if problem is None else [problem]
    damaged: list[Path] = []
    for folder in (directory.states / name for name in candidates):
        own = list(problems(folder, ranks.rank, ranks.world_size))
        found = [problem for part in ranks.gather(own) for problem in part]
        if not found:
            about = read_state(folder)
            assert about is not None
            return Found(folder, about.state, tuple(damaged), tuple(notes))
        damaged.append(folder)
        notes.append(f"state {folder} is damaged and not used: {found[0]}")
    if candidates:
        raise UserError(f"{directory.states}: no state is whole: {notes[-1]}; without this folder the run begins anew")
    return Found(None, TrainState(), (), tuple(notes))


def why_latest_is_none(directory: RunDirectory) -> str | None:
    """What is wrong with LATEST, which others than the core read; None where nothing is."""
    try:
        name = newest_state(directory)
    except UserError as error:
        return str(error)
    if name is None or directory.state(name).is_dir():
        return None
    return f"{directory.latest} names '{name}', which is not there"


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
    about = read_state(folder)
    assert about is not None
    files = [rank_file(folder, rank) for rank in range(about.world_size)]
    try:
        load_pieces(engine, files)
    except (ValueError, SafetensorError) as error:
        raise UserError(f"{folder}: the state does not fit this run: {error}") from None
    if about.world_size == ranks.world_size:
        with safe_open(files[ranks.rank], "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys() if key.startswith("rng:")}  # noqa: SIM118
            randomness.restore(tensors, read_notes(file), ranks.device)
        return []
    randomness.seed(abs(hash((seed, about.state.step, ranks.rank))))
    return [f"{about.world_size} rank(s) wrote the state, {ranks.world_size} go on: dropout is seeded anew"]
