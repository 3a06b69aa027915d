"""`make fuzz`: everything that dskd reads, with inputs that nobody would write, or that somebody would on purpose.

`python -m fuzz --count N --seed S [--only TARGET]` spreads N inputs over all targets. It ends with a table, and with
exit code 1 where an input was neither accepted nor refused in one line, took too long, or did harm; these are kept as
files.
"""

import argparse
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import chdir, contextmanager
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fuzz.light import light_targets
from fuzz.run import Playground, Result, Target, run_target


def main() -> int:
    parser = argparse.ArgumentParser(prog="fuzz", description="Read what nobody would write.")
    parser.add_argument("--count", type=int, default=2000, help="inputs in all")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", help="targets whose name contains this")
    asked = parser.parse_args()
    os.environ |= {"RUST_BACKTRACE": "0", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory(prefix="dskd-fuzz-") as folder, unheard():
        results = fuzz(Path(folder).resolve(), asked.count, asked.seed, asked.only)
    Console(width=120).print(table(results))
    for told in keep(results, asked.seed):
        print(told)
    return 1 if any(result.failures for result in results) else 0


@contextmanager
def unheard() -> Iterator[None]:
    """Inside, what libraries print, in Rust too, goes to a file; it is kept where the interpreter does not live on."""
    descriptor, log = tempfile.mkstemp(prefix="dskd-fuzz-", suffix=".log")
    print(f"libraries print to {log}", flush=True)
    before = os.dup(1), os.dup(2)
    for number in (1, 2):
        os.dup2(descriptor, number)
    try:
        yield
    finally:
        sys.stdout.flush()
        for number, own in zip((1, 2), before, strict=True):
            os.dup2(own, number)
    Path(log).unlink()


def fuzz(root: Path, count: int, seed: int, only: str = "") -> list[Result]:
    """Spread `count` inputs over the targets; `root` is an empty folder."""
    playground = Playground(root)
    playground.prepare()
    with chdir(playground.folder), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        targets = chosen(playground.folder, only)
        shares = [count // len(targets) + (index < count % len(targets)) for index in range(len(targets))]
        return [run_target(each, share, seed, playground) for each, share in zip(targets, shares, strict=True)]


def chosen(folder: Path, only: str) -> list[Target]:
    """Those that need torch are made last, and only where none of the others is meant."""
    light = [target for target in light_targets(folder) if only in target.name]
    if only and light:
        return light
    from fuzz.heavy import heavy_targets

    return light + [target for target in heavy_targets(folder) if only in target.name]


def table(results: Sequence[Result]) -> Table:
    shown = Table("target", box=None, pad_edge=False, header_style="bold")
    for name in ("inputs", "accepted", "refused", "slowest s", "failures"):
        shown.add_column(name, justify="right")
    for result in results:
        failures = len(result.failures)
        counts = (result.accepted + result.refused + failures, result.accepted, result.refused)
        shown.add_row(result.target, *map(str, counts), f"{result.slowest:.2f}", str(failures))
    return shown


def keep(results: Sequence[Result], seed: int) -> list[str]:
    """Save the inputs of failures; a line on each."""
    failures = [(result.target, failure) for result in results for failure in result.failures]
    folder = Path(tempfile.mkdtemp(prefix="dskd-fuzz-failures-")) if failures else Path()
    told = []
    for target, failure in failures:
        file = folder / f"{target.replace(' ', '-')}-{seed}-{failure.index}"
        file.write_bytes(failure.data)
        told.append(f"{target}, input {failure.index} of seed {seed} ({file}): {failure.reason}")
    return told


if __name__ == "__main__":
    raise SystemExit(main())
