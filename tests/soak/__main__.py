"""`make soak`: tiny real runs under random kills, signals, failing disk calls and damaged files.

    python -m soak [--kills N] [--disk N] [--damages N] [--seed N] [--jobs N] [--folder DIR]

Each campaign trains a run of ten steps (all methods in turn, ZeRO 2 and 3, one and two ranks, with and without a
scratch folder), harms it three to eight times, and compares metrics and every final file with the run that nothing
befell. It ends with a table, and exit code 1 where anything differed, hung, ended in a traceback or was lost. What
failed stays in the folder.
"""

import argparse
import itertools
import os
import sys
import tempfile
import threading
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

from rich.console import Console
from rich.table import Table

from dskd.config.methods import MethodConfig
from soak import harm

HARMS = {"kills": "kill", "disk": "disk", "damages": "damage"}


def options() -> argparse.Namespace:
    found = argparse.ArgumentParser(
        prog="make soak", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    found.add_argument("--kills", type=int, default=100, help="kills and signals at least (default: %(default)s)")
    found.add_argument("--disk", type=int, default=20, help="starts with failing disk calls (default: %(default)s)")
    found.add_argument("--damages", type=int, default=30, help="damaged files (default: %(default)s)")
    found.add_argument("--seed", type=int, default=1)
    found.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="campaigns at a time")
    found.add_argument("--folder", type=Path, help="where the runs lie; default: a temporary folder")
    return found.parse_args()


def main() -> int:
    wanted = options()
    folder = (wanted.folder or Path(tempfile.mkdtemp(prefix="dskd-soak-"))).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    shim = harm.build_shim(folder)
    if shim is not None:
        os.environ["LD_PRELOAD"] = str(shim)  # of the server that starts are forked off
    elif wanted.disk:
        print("no C compiler: no disk calls will fail", file=sys.stderr)
        wanted.disk = 0
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    from support.tiny import Tiny, write_run

    from soak.campaign import Setup, Tally, campaign, undisturbed

    tiny, started = Tiny(folder / "models"), time.monotonic()
    setups = [
        Setup(method, stage, ranks, scratch)
        for scratch, (stage, ranks), method in itertools.product(
            (False, True), ((2, 1), (3, 1), (2, 2), (3, 2)), MethodConfig.kinds
        )
    ]
    files: dict[str, Path] = {}
    for method in MethodConfig.kinds:
        place = folder / "files" / method
        place.mkdir(parents=True, exist_ok=True)
        files[method] = write_run(
            tiny,
            place,
            method={"kind": method},
            train={"epochs": 2, "global_batch_size": 8},
            engine={"persistence_threshold": 0},
            checkpoint={"every_steps": 2, "keep_last": 2},
        )
    references: dict[Setup, Path] = {}
    guard = threading.Lock()

    def one(number: int) -> Tally:
        setup = setups[number * 5 % len(setups)]  # neighbours differ in more than the method
        with guard:
            known = references.get(setup)
        if known is None:
            place = folder / "whole" / setup.name
            place.mkdir(parents=True, exist_ok=True)
            known = undisturbed(setup, files[setup.method], place)
            with guard:
                references[setup] = known
        root = folder / "campaigns" / str(number)
        root.mkdir(parents=True)
        still = tuple(HARMS[name] for name in HARMS if totals[name] < getattr(wanted, name)) or ("kill",)
        return campaign(setup, files[setup.method], known, root, wanted.seed * 1_000_003 + number, still)

    totals, tallies = dict.fromkeys(HARMS, 0), []
    numbers = itertools.count()
    with ThreadPoolExecutor(wanted.jobs) as pool:
        running: set[Future[Tally]] = set()
        while running or any(totals[name] < getattr(wanted, name) for name in HARMS):
            while len(running) < wanted.jobs and any(totals[name] < getattr(wanted, name) for name in HARMS):
                running.add(pool.submit(one, next(numbers)))
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                tally = future.result()
                tallies.append(tally)
                totals["kills"] += tally.kills
                totals["disk"] += tally.disk_faults
                totals["damages"] += tally.damages
                if len(tallies) % 10 == 0:
                    told = ", ".join(f"{count} {name}" for name, count in totals.items())
                    print(f"{len(tallies)} campaigns: {told}", file=sys.stderr, flush=True)
                for problem in tally.problems:
                    print(f"FAILED {problem}", file=sys.stderr, flush=True)
    show(tallies, time.monotonic() - started)
    return int(any(tally.problems for tally in tallies))


def show(tallies: list, seconds: float) -> None:
    table = Table("setup", "campaigns", "starts", "kills", "disk faults", "damages", "problems")
    for name in sorted({tally.setup for tally in tallies}):
        own = [tally for tally in tallies if tally.setup == name]
        table.add_row(name, *map(str, figures_of(own)))
    table.add_section()
    table.add_row("all", *map(str, figures_of(tallies)))
    console = Console(width=120)
    console.print(table)
    console.print(f"{seconds / 60:.1f} minutes")


def figures_of(tallies: list) -> tuple[int, ...]:
    return (
        len(tallies),
        *(sum(getattr(t, name) for t in tallies) for name in ("starts", "kills", "disk_faults", "damages")),
        sum(len(t.problems) for t in tallies),
    )


if __name__ == "__main__":
    sys.exit(main())
