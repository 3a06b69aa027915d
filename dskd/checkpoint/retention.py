"""Which states and models stay. One rule: what a whole state, or one on its way, names is never deleted.

Called after each publication, and once more at every start, since a kill may have come in between.
"""

import shutil
from collections.abc import Collection, Sequence
from pathlib import Path

from dskd.config.errors import UserError
from dskd.rundir.files import damage, read_manifest
from dskd.rundir.layout import RunDirectory, StateName, beside, set_aside
from dskd.rundir.train_state import SavedModel, TrainState, read_state


def retain(directory: RunDirectory, newest: TrainState, keep_last: int, coming: Collection[SavedModel] = ()) -> None:
    """Delete older states, and the models that none of the kept ones names; link the best model.

    Args:
        newest: the newest published state.
        coming: the models that a state which is not published yet will name.
    """
    kept = kept_states(directory.state_names(), keep_last)
    for name in directory.state_names():
        if name not in kept:
            shutil.rmtree(directory.state(name))
    link_best(directory, newest.best)
    named = {saved.folder for saved in (*newest.best, *coming, *named_by(directory, kept))}
    for folder, model in directory.models():
        # A later one, that a lost state knew of, comes again when the run has reached its step.
        if folder.name not in named and model.step <= newest.step:
            shutil.rmtree(folder)


def kept_states(newest_first: Sequence[StateName], keep_last: int) -> list[StateName]:
    """The states of the last `keep_last` steps; of two of one step the one with its evaluation done."""
    by_step: dict[int, StateName] = {}
    for name in newest_first:
        by_step.setdefault(name.step, name)
    return list(by_step.values())[:keep_last]


def named_by(directory: RunDirectory, states: Collection[StateName]) -> list[SavedModel]:
    """The models that these states name; a state that cannot be read names none."""
    found: list[SavedModel] = []
    for name in states:
        try:
            about = read_state(directory.state(name))
        except UserError:
            continue
        found += () if about is None else about.state.best
    return found


def link_best(directory: RunDirectory, best: Sequence[SavedModel]) -> None:
    """Let `best` name the first of these models; it never names one that is not there."""
    present = [saved.folder for saved in best if (directory.path / saved.folder).is_dir()]
    if not present:
        if directory.best.is_symlink() and not directory.best.exists():
            directory.best.unlink()
        return
    link = beside(directory.best, "link")
    link.unlink(missing_ok=True)
    link.symlink_to(present[0])
    if directory.best.is_dir() and not directory.best.is_symlink():
        shutil.rmtree(directory.best)  # the run was copied with its links followed: a second copy of a model
    link.replace(directory.best)


def sound_models(directory: RunDirectory, best: Sequence[SavedModel]) -> tuple[tuple[SavedModel, ...], list[str]]:
    """Those of the models that are whole, and what to tell of the others, which are set aside."""
    sound, notes = [], []
    for saved in best:
        folder = directory.path / saved.folder
        problem = model_problem(folder)
        if problem is None:
            sound.append(saved)
        else:
            notes.append(f"model {folder} is damaged and not used: {problem}")
            put_aside(folder)
    return tuple(sound), notes


def model_problem(folder: Path) -> str | None:
    """What is wrong with a saved model; None where it is what its manifest says."""
    if not folder.is_dir():
        return "it is not there"
    try:
        listed = read_manifest(folder)
    except ValueError as error:
        return str(error)
    problems = (damage(folder / name, expected) for name, expected in listed.items())
    return next((problem for problem in problems if problem is not None), None)


def put_aside(folder: Path) -> None:
    """Rename what is damaged, where it is there, so that it does not count any more."""
    if folder.is_dir():
        folder.rename(set_aside(folder))
