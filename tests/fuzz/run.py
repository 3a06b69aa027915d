"""Inputs are read one after the other, and each must be accepted or refused in one line, soon, and do no harm."""

import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from dskd.config.errors import UserError
from fuzz.mutations import MARKER, VICTIM, Mutate, spliced

SECONDS = 10.0
LONGEST = 600


@dataclass(frozen=True)
class Target:
    """A reader of what others may have written."""

    name: str
    seeds: Sequence[bytes]
    """Valid inputs."""
    mutate: Mutate
    read: Callable[[bytes], object]
    refusal: type[Exception] | tuple[type[Exception], ...] = UserError
    """What a reader raises for an input that it does not take."""


@dataclass(frozen=True)
class Failure:
    index: int
    reason: str
    data: bytes


@dataclass
class Result:
    """What became of a target's inputs."""

    target: str
    accepted: int = 0
    refused: int = 0
    slowest: float = 0.0
    failures: list[Failure] = field(default_factory=list)


class TooSlow(BaseException):
    """The input took longer than `SECONDS`."""


class Harm(Exception):
    """An accepted input has done, or would do, what only the program may."""


@dataclass(frozen=True)
class Playground:
    """A folder to work in, and what must stay as it is around it."""

    root: Path

    @property
    def folder(self) -> Path:
        return self.root / "folder"

    @property
    def marker(self) -> Path:
        """What an injected command would make."""
        return self.root / "marker"

    @property
    def victim(self) -> Path:
        """What a path that leads out of the folder would change."""
        return self.root / "victim"

    def prepare(self) -> None:
        self.folder.mkdir()
        self.victim.write_text("untouched")

    def around(self) -> list[tuple[str, int, int]]:
        """Names, sizes and times of all that lies around the folder."""
        found = [(path.name, path.lstat()) for path in self.root.iterdir() if path != self.folder]
        return sorted((name, about.st_size, about.st_mtime_ns) for name, about in found)

    def filled(self, data: bytes) -> bytes:
        return data.replace(MARKER.encode(), bytes(self.marker)).replace(VICTIM.encode(), bytes(self.victim))


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    def ring(number: int, frame: object) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def inputs_of(target: Target, count: int, seed: int, playground: Playground) -> Iterator[bytes]:
    """The same for the same seed, whatever the other targets are."""
    for index in range(count):
        yield playground.filled(spliced(Random(f"{seed} {target.name} {index}"), target.seeds, target.mutate))


def problem_of(target: Target, data: bytes) -> tuple[bool, str | None]:
    """Whether a target accepts an input, and what is wrong with how it takes it; None where nothing is."""
    try:
        with at_most(SECONDS):
            target.read(data)
    except target.refusal as error:
        said = str(error)
        return False, None if said.isprintable() and 0 < len(said) <= LONGEST else f"not one line: {said[:300]!r}"
    except TooSlow:
        return False, f"took longer than {SECONDS:.0f} s"
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # of Rust's panic as well
        return False, f"{type(error).__name__}: {str(error)[:300]!r}"
    return True, None


def run_target(target: Target, count: int, seed: int, playground: Playground) -> Result:
    """Read so many inputs, after the valid ones."""
    result, before = Result(target.name), playground.around()
    for data in target.seeds:
        accepted, problem = problem_of(target, data)
        if not accepted:
            result.failures.append(Failure(-1, problem or "a valid input is refused", data))
    for index, data in enumerate(inputs_of(target, count, seed, playground)):
        began = time.monotonic()
        accepted, problem = problem_of(target, data)
        result.slowest = max(result.slowest, time.monotonic() - began)
        if problem is None and playground.around() != before:
            problem, before = "something around the folder has changed", playground.around()
        if problem is not None:
            result.failures.append(Failure(index, problem, data))
        elif accepted:
            result.accepted += 1
        else:
            result.refused += 1
    return result


def check_script(script: str, plain: str) -> None:
    """Raise `Harm` where a batch script is no shell, or says more than the same one of plain values."""
    done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Harm(f"bash -n: {done.stderr}")
    if len(script.splitlines()) != len(plain.splitlines()):
        raise Harm(f"{len(script.splitlines())} lines, and of plain values {len(plain.splitlines())}")
    if options(script) != options(plain):
        raise Harm(f"other options: {options(script)} and not {options(plain)}")


def options(script: str) -> list[str]:
    """Names of the options of sbatch."""
    return [line.partition("=")[0] for line in script.splitlines() if line.lstrip().startswith("#SBATCH")]
