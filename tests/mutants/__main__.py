"""`make mutants`: whether the tests notice mistakes that are made on purpose, one at a time, in a copy of the project.

    python -m mutants [NAME...]

Prints for each mistake of `mutants.table` the first test that noticed it. Exit code 1 where one was not, 2 where the
table or the tests are not as they should be.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mutants.mutant import Mutant
from mutants.table import MUTANTS

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("dskd", "tests", "jobs", "slurm", "docker", "pyproject.toml", "README.md")
SECONDS = 600
"""What has no end after so long has been noticed as well."""
PASSED, FAILED = 0, 1


def main() -> int:
    options = argparse.ArgumentParser(prog="make mutants", description=__doc__)
    options.add_argument("names", nargs="*", metavar="NAME", help="the mistakes to make; all without any")
    wanted = options.parse_args().names
    unknown = sorted(set(wanted) - {mutant.name for mutant in MUTANTS})
    if unknown:
        return wrong(f"no mistake has the name {unknown[0]!r}")
    chosen = [mutant for mutant in MUTANTS if not wanted or mutant.name in wanted]
    with tempfile.TemporaryDirectory(prefix="dskd-mutants-") as folder:
        copy = copied(Path(folder))
        for problem in [*stale(copy, MUTANTS), *not_imported(copy)]:
            return wrong(problem)
        code, said, seconds = tested(copy, [test for mutant in chosen for test in mutant.tests.split()])
        if code != PASSED:
            return wrong(f"without any mistake the tests do not pass: {first_failure(said) or said}")
        print(f"without any mistake: all pass, {seconds:.0f} s", flush=True)
        rows = [(mutant, *noticed(copy, mutant)) for mutant in chosen]
    table = Table("mistake", "noticed by", "s")
    for mutant, by, seconds in rows:
        table.add_row(mutant.name, escape(by or "NOTHING"), f"{seconds:.0f}")
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    unnoticed = sum(by is None for _, by, _ in rows)
    print(f"{len(rows) - unnoticed} of {len(rows)} mistakes were noticed")
    return 1 if unnoticed else 0


def wrong(problem: str) -> int:
    print(f"mutants: {problem}", file=sys.stderr)
    return 2


def copied(folder: Path) -> Path:
    """The project in another folder."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, folder / name)
    return folder


def stale(copy: Path, mutants: Iterable[Mutant]) -> list[str]:
    """What the table says of the project that is not so."""
    found = []
    for name, file, old, new, tests in mutants:
        times = (copy / file).read_text().count(old) if (copy / file).is_file() else 0
        if times != 1 or old == new:
            found.append(f"{name}: {old!r} is {times} times in {file}, and once is expected")
        missing = [test for test in tests.split() if not (copy / test.partition("::")[0]).is_file()]
        found += [f"{name}: {test} is not there" for test in missing]
    return found


def not_imported(copy: Path) -> list[str]:
    """What is wrong where the copy is not what is imported in it."""
    command = [sys.executable, "-c", "import dskd; print(dskd.__file__)"]
    said = subprocess.run(command, cwd=copy, env=environment(copy), capture_output=True, text=True, check=True).stdout
    expected = copy / "dskd" / "__init__.py"
    return [] if Path(said.strip()).resolve() == expected.resolve() else [f"{said.strip()} is imported in the copy"]


def environment(copy: Path) -> dict[str, str]:
    """The copy goes before the project that is installed; no mistake leaves compiled code behind."""
    paths = os.pathsep.join([str(copy), str(copy / "tests")])
    return os.environ | {"PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}


def noticed(copy: Path, mutant: Mutant) -> tuple[str | None, float]:
    """The first test that fails with a mistake in the copy, None without; and seconds."""
    file = copy / mutant.file
    before = file.read_text()
    file.write_text(before.replace(mutant.old, mutant.new))
    try:
        code, said, seconds = tested(copy, mutant.tests.split())
    finally:
        file.write_text(before)
    if code is None:
        by: str | None = f"no end after {SECONDS} s"
    elif code in (PASSED, FAILED):
        by = first_failure(said) if code == FAILED else None
    else:
        raise SystemExit(wrong(f"{mutant.name}: pytest ends with {code}: {said}"))
    print(f"{mutant.name}: {by or 'NOTHING'}, {seconds:.0f} s", flush=True)
    return by, seconds


def tested(copy: Path, tests: Sequence[str]) -> tuple[int | None, str, float]:
    """Run tests up to the first failure: pytest's exit code (None: no end), what it said last, and seconds."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--tb=no", "-p", "no:cacheprovider", *dict.fromkeys(tests)]
    started = time.monotonic()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command, cwd=copy, env=environment(copy), stdout=output, stderr=output, start_new_session=True
        )
        try:
            code: int | None = process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            end_all(process)
        output.seek(0)
        said = output.read().decode(errors="replace")
    return code, said[-2000:], time.monotonic() - started


def end_all(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and all that it has left running."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    finally:
        process.wait()


def first_failure(said: str) -> str | None:
    """The id of the first test in pytest's summary."""
    found = re.search(r"^(?:FAILED|ERROR) (\S+::\w+(?:\[.*?\](?= - |$))?)", said, re.M)
    return found[1] if found else None


if __name__ == "__main__":
    sys.exit(main())
