"""Calls of Slurm's own commands: retried while the controller does not answer, and told in one line where they fail."""

import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import stamina

from dskd.config.errors import UserError

UNREACHABLE = re.compile(r"Unable to contact slurm controller|Connection refused|Zero Bytes were transmitted", re.I)
GONE = re.compile(r"Invalid job id|already completing or completed", re.I)
ATTEMPTS, WAIT, SECONDS = 4, 1.0, 30.0
# What sbatch says when it refuses, and the key of the cluster profile that it is about.
KEYS = (
    (r"account", "account"),
    (r"qos", "qos"),
    (r"invalid partition|partition", "partition"),
    (r"time limit", "hours"),
    (r"memory", "memory_gb"),
    (r"feature|constraint", "constraint"),
    (r"gres|gpu", "gpus_per_node"),
    (r"node (count|configuration)", "launch.nodes of the run, or gpus_per_node, cpus_per_node, memory_gb"),
    (r"cpu", "cpus_per_node"),
)
T = TypeVar("T")


class Unreachable(Exception):
    """The controller does not answer; nothing was done."""


@dataclass(frozen=True)
class QueueEntry:
    """A job that is in the queue, pending or running."""

    state: str
    nodes: str
    reason: str


def require_slurm() -> None:
    if shutil.which("sbatch") is None:
        raise UserError("Slurm is not installed here (no sbatch on PATH): submit from a login node of the cluster")


def patiently(call: Callable[[], T]) -> T:
    """Run a call of Slurm again while it raises `Unreachable`, with a limit; then raise `UserError`."""
    try:
        for attempt in stamina.retry_context(on=Unreachable, attempts=ATTEMPTS, timeout=SECONDS, wait_initial=WAIT):
            with attempt:
                return call()
    except Unreachable as error:
        raise UserError(f"the Slurm controller does not answer ({error}); tried {ATTEMPTS} times") from None
    raise AssertionError("unreachable")


def run(*command: str) -> str:
    """Output of a Slurm command.

    Raises:
        Unreachable: where the controller does not answer.
        subprocess.CalledProcessError: for any other failure, with what it said in `stderr`.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise_unreachable(done.stderr)
        raise subprocess.CalledProcessError(done.returncode, command, done.stdout, done.stderr)
    return done.stdout


def raise_unreachable(said: str) -> None:
    if UNREACHABLE.search(said):
        raise Unreachable(one_line(said))


def refused(said: str) -> UserError:
    """sbatch's own words, and which key to change."""
    words = one_line(said)
    key = next((key for pattern, key in KEYS if re.search(pattern, words, re.I)), None)
    hint = f"; change {key} (cluster profile)" if key and "run" not in key else f"; change {key}" if key else ""
    return UserError(f"sbatch refused: {words}{hint}")


def one_line(said: str) -> str:
    """Slurm's message without the names of its programs."""
    lines = [re.sub(r"^(sbatch|squeue|scancel|scontrol|sacct): (error|fatal): ", "", x) for x in said.splitlines()]
    return "; ".join(line.strip() for line in lines if line.strip())


def queue(ids: Sequence[str]) -> dict[str, QueueEntry]:
    """The jobs of `ids` that are in the queue, one call for all."""
    if not ids:
        return {}
    mains = sorted({i.partition("_")[0] for i in ids})
    listing = ("squeue", "--noheader", "--array", f"--jobs={','.join(mains)}", "--format=%i|%T|%N|%r")
    try:
        text = patiently(lambda: run(*listing))
    except subprocess.CalledProcessError as error:
        if "Invalid job id" in error.stderr:
            return {}
        raise UserError(f"squeue failed: {one_line(error.stderr)}") from None
    entries = [line.split("|", 3) for line in text.splitlines() if line.count("|") >= 3]
    return {i: QueueEntry(state, nodes, reason) for i, state, nodes, reason in entries if i in set(ids)}


def cancel(*jobs: str, options: Sequence[str] = ()) -> bool:
    """Let `scancel` end jobs, or signal them; whether they were in the queue still. Raises `UserError`."""
    try:
        patiently(lambda: run("scancel", *options, *jobs))
    except subprocess.CalledProcessError as error:
        if GONE.search(error.stderr):
            return False
        raise UserError(f"scancel failed: {one_line(error.stderr)}") from None
    return True


def ended(ids: Sequence[str]) -> dict[str, QueueEntry]:
    """What accounting, or without it the controller's memory, knows of jobs that left the queue."""
    found = {i: entry for i in ids if (entry := _from_controller(i))}
    missing = [i for i in ids if i not in found]
    return found | (_from_accounting(missing) if missing else {})


def _from_controller(job: str) -> QueueEntry | None:
    try:
        text = patiently(lambda: run("scontrol", "--oneliner", "show", "job", job))
    except subprocess.CalledProcessError:
        return None
    words = dict(re.findall(r"(\w+)=(\S+)", text.splitlines()[0])) if text.strip() else {}
    nodes = words.get("NodeList", "")
    return QueueEntry(words.get("JobState", ""), "" if nodes == "(null)" else nodes, words.get("Reason", ""))


def _from_accounting(ids: Sequence[str]) -> dict[str, QueueEntry]:
    listing = ("sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={','.join(ids)}")
    try:
        text = run(*listing, "--format=JobID,State,NodeList")
    except (subprocess.CalledProcessError, Unreachable, FileNotFoundError):
        return {}  # a cluster without accounting
    rows = [line.split("|") for line in text.splitlines()]
    known = [(i, state.split()[0], "" if nodes == "None assigned" else nodes) for i, state, nodes in rows]
    return {i: QueueEntry(state, nodes, "") for i, state, nodes in known if i in set(ids)}
