"""One campaign: a tiny real run is harmed again and again until it ends, and must end like the run that never was."""

import random
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

from support.compare import figures
from support.starts import Start

from dskd.rundir.files import sha256
from soak import harm

ROUNDS = 40
"""Starts after which a run that still has not ended counts as hanging."""
START_SECONDS = 120.0


@dataclass(frozen=True)
class Setup:
    """What is trained: method, ZeRO stage, ranks, by way of a scratch folder or not."""

    method: str
    stage: int
    ranks: int
    scratch: bool

    @property
    def name(self) -> str:
        return f"{self.method}-zero{self.stage}-{self.ranks}ranks" + ("-scratch" if self.scratch else "")

    def command(self, run_file: Path, root: Path) -> list[object]:
        scratch = [f"checkpoint.scratch_dir={root}/scratch"] if self.scratch else []
        return ["train", run_file, f"engine.zero_stage={self.stage}", f"output.root={root}/out", *scratch]


@dataclass
class Tally:
    """What happened in a campaign."""

    setup: str
    starts: int = 0
    kills: int = 0
    damages: int = 0
    disk_faults: int = 0
    problems: list[str] = field(default_factory=list)


def run_directory(root: Path) -> Path:
    """The only run below a root, or where it will be found to be missing."""
    return next((root / "out").glob("*/*/default"), root / "out" / "none")


def sums(directory: Path) -> dict[str, str]:
    """sha256 of everything that must be the same at the end: the best model and the newest state."""
    best, states = (directory / "best").resolve(), directory / "resume"
    newest = states / (states / "LATEST").read_text().strip()
    files = [file for folder in (best, newest) for file in folder.rglob("*.safetensors")]
    return {f"{file.parent.name}/{file.name}": sha256(file) for file in sorted(files)}


def undisturbed(setup: Setup, run_file: Path, root: Path) -> Path:
    start = Start(root / "log", *setup.command(run_file, root), ranks=setup.ranks)
    codes = start.wait(START_SECONDS)
    assert codes == [0] * setup.ranks, start.text()[-3000:]
    return run_directory(root)


def campaign(setup: Setup, run_file: Path, reference: Path, root: Path, seed: int, harms: tuple[str, ...]) -> Tally:
    """Harm one run until it has ended; `harms` are drawn from `kill`, `disk` and `damage`."""
    chance, tally = random.Random(seed), Tally(setup.name)
    command = setup.command(run_file, root)
    story: list[str] = []
    for _ in range(ROUNDS):
        directory = run_directory(root)
        kind = chance.choice(harms) if len(story) < 3 + chance.randrange(6) else "none"
        if kind == "damage":
            done = harm.damage_something(directory, chance)
            if done is None:
                kind = "kill"
            else:
                story.append(done)
                tally.damages += 1
        environment: dict[str, str] = {}
        if kind == "disk":
            fault = harm.DiskFault.draw(chance)
            environment[harm.FAULT] = harm.arm(root / "out", fault)
            story.append(str(fault))
            tally.disk_faults += 1
        tally.starts += 1
        (root / "log").unlink(missing_ok=True)
        start = Start(root / "log", *command, ranks=setup.ranks, **environment)
        if kind == "kill":
            time.sleep(chance.uniform(0.05, 3.5))
            number = chance.choice(harm.SIGNALS)
            start.send(number)
            story.append(f"signal {number}")
            tally.kills += 1
        try:
            codes = start.wait(START_SECONDS)
        except AssertionError as error:
            tally.problems.append(f"hang: {error}")
            break
        problem = what_is_wrong(kind, codes, start.text())
        if problem is not None:
            tally.problems.append(f"{problem}: {start.text()[-1500:]}")
            break
        if codes == [0] * setup.ranks and kind in ("none", "kill"):
            tally.problems += differences(reference, run_directory(root), root)
            break
    else:
        tally.problems.append(f"not finished after {ROUNDS} starts")
    tally.problems = [f"{setup.name}, seed {seed}, after {'; '.join(story)}: {p}" for p in tally.problems]
    if not tally.problems:
        shutil.rmtree(root)
    return tally


def what_is_wrong(kind: str, codes: list[int], said: str) -> str | None:
    """Whether a start ended in a way that it must not."""
    allowed = {0, 75}
    if kind == "kill":
        allowed |= {130, *(-number for number in harm.SIGNALS)}  # before it had its handlers
    if kind == "disk":
        allowed |= {2}
    if "Traceback" in said:
        return "a traceback"
    if not set(codes) <= allowed:
        return f"exit codes {codes}"
    return None


def differences(reference: Path, directory: Path, root: Path) -> list[str]:
    found = []
    if not (directory / "resume" / "LATEST").is_file():
        return ["no LATEST"]
    if figures(directory) != figures(reference):
        found.append("metrics differ")
    expected, actual = sums(reference), sums(directory)
    if expected != actual:
        names = sorted(name for name in expected.keys() | actual.keys() if expected.get(name) != actual.get(name))
        found.append(f"files differ: {', '.join(names)}")
    if not (directory / "best").exists():
        found.append("best names nothing")
    left = [p for p in directory.rglob(".*") if p.name not in (".lock",)]
    left += [p for p in (root / "scratch").rglob("*") if p.is_file()]
    if left:
        found.append(f"left behind: {', '.join(p.name for p in left)}")
    return found
