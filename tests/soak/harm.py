"""What is done to a run: signals at random moments, failing disk calls, damaged files."""

import ctypes
import errno
import os
import random
import shutil
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

SIGNALS = (
    signal.SIGKILL,
    signal.SIGKILL,
    signal.SIGKILL,
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGUSR1,
    signal.SIGUSR2,
)
FAULT = "SOAK_FAULT"
"""Variable of the environment that tells a start which fault to arm."""
ERRORS = (errno.EIO, errno.ENOSPC, errno.ESTALE, 0)
CALLS = ("write", "write", "fsync", "rename", "open", "mkdir")
ONCE, FOR_GOOD = 1, 10**9


@dataclass(frozen=True)
class DiskFault:
    """From the `after`-th call of a kind below the run's output on, `times` calls fail; error 0 shortens writes."""

    call: str
    after: int
    error: int
    times: int

    @classmethod
    def draw(cls, chance: random.Random) -> "DiskFault":
        error, call = chance.choice(ERRORS), chance.choice(CALLS)
        reach = {"write": 120, "fsync": 60, "rename": 16, "open": 60, "mkdir": 8}[call]
        times = chance.choice((ONCE, ONCE, 2, FOR_GOOD))
        return cls("write" if error == 0 else call, chance.randrange(reach), error, times)

    def __str__(self) -> str:
        how = "short" if self.error == 0 else errno.errorcode[self.error]
        return f"{self.call} {how} x{'ever' if self.times == FOR_GOOD else self.times} after {self.after}"


def build_shim(folder: Path) -> Path | None:
    """The library that lets calls fail; None where there is no C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return None
    library = folder / "shim.so"
    source = Path(__file__).with_name("shim.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O2", "-o", library, source, "-ldl"], check=True)
    return library


def arm(folder: Path, fault: DiskFault) -> str:
    """The value of `FAULT` for a start."""
    return f"{folder}|{fault.call}|{fault.after}|{fault.error}|{fault.times}"


def arm_this_process() -> None:
    """What a start does first, where `FAULT` says so."""
    if FAULT in os.environ:
        folder, call, after, error, times = os.environ.pop(FAULT).split("|")
        library = ctypes.CDLL(None)
        library.arm.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_long, ctypes.c_int, ctypes.c_long]
        library.arm(folder.encode(), call.encode(), int(after), int(error), int(times))


def damage_something(directory: Path, chance: random.Random) -> str | None:
    """Harm a file from which a run must recover; what was done, None where there is nothing to harm yet.

    The newest of two states, a saved model, LATEST, the end of metrics.jsonl, args.json.
    """
    states = sorted(directory.glob("resume/step*"), key=lambda p: p.stat().st_mtime)
    choices: list[Path] = [*directory.glob("resume/LATEST"), *directory.glob("args.json")]
    if len(states) > 1:
        choices += list(states[-1].iterdir()) * 2
    choices += [file for model in directory.glob("epoch*_step*") for file in model.iterdir()]
    if not choices:
        return None
    file = chance.choice(choices)
    content = file.read_bytes()
    how = chance.choice(("flip", "cut", "remove", "garbage"))
    if how == "flip" and content:
        place = chance.randrange(len(content))
        file.write_bytes(content[:place] + bytes([content[place] ^ 1 << chance.randrange(8)]) + content[place + 1 :])
    elif how == "cut":
        file.write_bytes(content[: chance.randrange(max(1, len(content)))])
    elif how == "remove":
        file.unlink()
    else:
        file.write_bytes(chance.randbytes(chance.randrange(200)))
    return f"{how} {file.relative_to(directory)}"
