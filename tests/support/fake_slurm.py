"""Slurm's commands as small programs that keep their queue in a folder, and what a test does with them.

`FakeSlurm(folder)` writes sbatch, squeue, scancel, scontrol, sacct and srun into folder/bin; each runs this very file.
They know the options that dskd and submitit use, and say what Slurm says. Nothing starts by itself: a job is pending
until the test gives it another state, or runs its batch script.
"""

import fcntl
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from io import StringIO
from pathlib import Path
from typing import Any

ACTIVE = ("PENDING", "RUNNING", "COMPLETING")
UNKNOWN_JOB = "slurm_load_jobs error: Invalid job id specified"
EMPTY = {"jobs": {}, "answers": [], "down": 0, "requeue": "", "accounting": True}


class Queue:
    """What all programs and the test share."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.file = folder, folder / "queue.json"

    @contextmanager
    def changed(self) -> Iterator[dict[str, Any]]:
        """The jobs by id, and what the test has told the programs to do; inside, no one else has them."""
        with (self.folder / "lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            values = json.loads(self.file.read_text())
            try:
                yield values
            finally:
                self.file.write_text(json.dumps(values))

    def script(self, id_: str) -> Path:
        return self.folder / f"{id_.partition('_')[0]}.sh"


def of(jobs: dict[str, Any], id_: str) -> list[dict[str, Any]]:
    """A job, or all elements of an array."""
    return [job for job in jobs.values() if id_ in (job["id"], job["id"].partition("_")[0])]


def parse(arguments: Sequence[str], flags: Sequence[str], options: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The options that stand first, and the rest."""
    found, rest = {}, list(arguments)
    while rest and rest[0].startswith("--"):
        name, _, value = rest.pop(0)[2:].partition("=")
        if name not in (*flags, *options):
            sys.exit(f"{sys.argv[1]}: unrecognized option '--{name}'")
        found[name] = value or (rest.pop(0) if name in options else "")
    return found, rest


def sbatch_options(script: str) -> dict[str, str]:
    lines = [shlex.split(line)[1] for line in script.splitlines() if line.startswith("#SBATCH ")]
    return dict(line.removeprefix("--").partition("=")[::2] for line in lines)


def sbatch(queue: Queue, arguments: list[str]) -> None:
    (file,) = arguments
    script = Path(file).read_text()
    options = sbatch_options(script)
    hold(queue.folder)
    with queue.changed() as values:
        jobs = values["jobs"]
        refusal = values["answers"].pop(0) if values["answers"] else ""
        waits_for = options.get("dependency", "").split(":")[1:]
        if any(not of(jobs, id_) for id_ in waits_for):
            refusal = "Batch job submission failed: Job dependency problem"
        if refusal:
            sys.exit("\n".join(f"sbatch: error: {line}" for line in refusal.splitlines()))
        main = str(max((int(id_.partition("_")[0]) for id_ in jobs), default=100) + 1)
        last = re.match(r"0-(\d+)", options.get("array", ""))
        for id_ in [f"{main}_{i}" for i in range(int(last[1]) + 1)] if last else [main]:
            reason = "Dependency" if waits_for else "Priority"
            jobs[id_] = {"id": id_, "state": "PENDING", "reason": reason, "nodes": "", "restarts": 0}
            jobs[id_] |= {"signals": [], "tasks": [], "known": True, "accounted": True}
    queue.script(main).write_text(script)
    print(f"Submitted batch job {main}")


def hold(folder: Path) -> None:
    """The first call after `FakeSlurm.hold` waits until the test lets it go on."""
    with suppress(FileNotFoundError):
        (folder / "hold").rename(folder / "held")
        while (folder / "held").exists():
            time.sleep(0.01)


def squeue(queue: Queue, arguments: list[str]) -> None:
    options, rest = parse(arguments, ["noheader", "array"], ["jobs", "format"])
    assert (len(options), rest) == (4, [])
    with queue.changed() as values:
        found = [j for id_ in options["jobs"].split(",") for j in of(values["jobs"], id_) if j["known"]]
    if not found:
        sys.exit(UNKNOWN_JOB)
    for job in found:
        if job["state"] in ACTIVE:
            columns = {"i": job["id"], "T": job["state"], "N": job["nodes"], "r": job["reason"]}
            print(re.sub(r"%([iTNr])", lambda match, v=columns: v[match[1]], options["format"]))


def scancel(queue: Queue, arguments: list[str]) -> None:
    options, ids = parse(arguments, [], ["signal"])
    with queue.changed() as values:
        found = [job for id_ in ids for job in of(values["jobs"], id_)]
        if not found:
            sys.exit(f"scancel: error: Kill job error on job id {ids[0]}: Invalid job id specified")
        for job in found:
            if "signal" not in options:
                job["state"] = "CANCELLED" if job["state"] in ACTIVE else job["state"]
            elif job["state"] == "RUNNING":
                job["signals"].append(options["signal"])
                for task in job["tasks"]:
                    os.kill(task, signal.Signals[f"SIG{options['signal']}"])


def scontrol(queue: Queue, arguments: list[str]) -> None:
    options, (verb, *words) = parse(arguments, ["oneliner"], [])
    with queue.changed() as values:
        found = [job for job in of(values["jobs"], words[-1]) if job["known"]]
        if not found:
            sys.exit(UNKNOWN_JOB)
        (job,) = found
        if verb == "requeue":
            if values["requeue"]:
                sys.exit(values["requeue"])
            job |= {"state": "PENDING", "reason": "BeginTime", "nodes": "", "restarts": job["restarts"] + 1}
        else:
            assert (verb, words[0]) == ("show", "job")
            words = [f"JobId={job['id']}", f"JobState={job['state']}", f"Reason={job['reason']}"]
            print(*words, f"NodeList={job['nodes'] or '(null)'}", sep=" " if "oneliner" in options else "\n   ")
    if verb == "requeue":
        end_later(os.getppid())


def end_later(caller: int) -> None:
    """As Slurm ends the script of a requeued job: a moment after scontrol has answered."""
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.Popen(["sh", "-c", f"sleep 0.3; kill -KILL {caller}"], **silent)


def sacct(queue: Queue, arguments: list[str]) -> None:
    options, rest = parse(arguments, ["noheader", "parsable2", "allocations"], ["jobs", "format"])
    assert (len(options), rest) == (5, [])
    with queue.changed() as values:
        if not values["accounting"]:
            sys.exit("Slurm accounting storage is disabled")
        found = [j for id_ in options["jobs"].split(",") for j in of(values["jobs"], id_) if j["accounted"]]
    for job in found:
        state = "CANCELLED by 1000" if job["state"] == "CANCELLED" else job["state"]
        row = {"JobID": job["id"], "State": state, "NodeList": job["nodes"] or "None assigned"}
        print(*(row[name] for name in options["format"].split(",")), sep="|")


def srun(queue: Queue, arguments: list[str]) -> None:
    """Starts the tasks on this machine; ends the others when one fails."""
    options, command = parse(
        arguments, ["unbuffered"], ["ntasks", "ntasks-per-node", "output", "error", "kill-on-bad-exit"]
    )
    count = int(options.get("ntasks", os.environ["SLURM_NTASKS"]))
    share = count // int(os.environ["SLURM_JOB_NUM_NODES"])
    tasks = []
    for rank in range(count):
        places = {"PROCID": rank, "LOCALID": rank % share, "NODEID": rank // share, "NTASKS": count}
        environment = os.environ | {f"SLURM_{name}": str(value) for name, value in places.items()}
        outputs = {
            stream: expand(options[name], environment, rank).open("ab") if name in options else None
            for stream, name in (("stdout", "output"), ("stderr", "error"))
        }
        tasks.append(subprocess.Popen(command, env=environment, **outputs))
    with queue.changed() as values:
        values["jobs"][os.environ["FAKE_SLURM_JOB"]]["tasks"] = [task.pid for task in tasks]
    while None in (codes := [task.poll() for task in tasks]):
        for number in (signal.SIGTERM, signal.SIGKILL) if any(codes) and "kill-on-bad-exit" in options else ():
            for task in tasks:
                task.send_signal(number)
            time.sleep(0.3)
        time.sleep(0.02)
    sys.exit(max(code if code >= 0 else 128 - code for code in codes))


def expand(file: str, environment: Mapping[str, str], rank: int = 0) -> Path:
    """Slurm's patterns in the name of a file."""
    main, _, element = environment["FAKE_SLURM_JOB"].partition("_")
    values = {"j": environment["SLURM_JOB_ID"], "t": str(rank), "A": main, "a": element}
    return Path(re.sub(r"%([jtAa])", lambda match: values[match[1]], file))


def program(folder: Path, name: str, arguments: list[str]) -> None:
    queue = Queue(folder)
    with (folder / "calls.jsonl").open("a") as calls:
        calls.write(json.dumps([name, *arguments]) + "\n")
    with queue.changed() as values:
        if values["down"] > 0 and name not in ("srun", "sacct"):
            values["down"] -= 1
            sys.exit(f"{name}: error: Unable to contact slurm controller (connect failure)")
    globals()[name](queue, arguments)


class FakeSlurm:
    """The programs, their queue, and a test's hand in it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bin, self.queue = folder, folder / "bin", Queue(folder / "queue")
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.queue.folder.mkdir()
        self.queue.file.write_text(json.dumps(EMPTY))
        self.bin.mkdir()
        for name in ("sbatch", "squeue", "scancel", "scontrol", "sacct", "srun"):
            words = [sys.executable, "-IS", str(Path(__file__).resolve()), name, str(self.queue.folder)]
            (self.bin / name).write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
            (self.bin / name).chmod(0o755)

    def install(self, patch: Any) -> None:
        """Make this the Slurm of a test, even where that runs in the job of another, or as a rank."""
        for name in [name for name in os.environ if name.startswith(("SLURM_", "SUBMITIT_")) or name == "RANK"]:
            patch.delenv(name)
        patch.setenv("PATH", f"{self.bin}:{os.environ['PATH']}")

    def profile(self, **keys: Any) -> Path:
        """A cluster profile; what a rank runs in the place of Python is folder/rank, which a test may write."""
        base = {"partition": "low", "hours": 1, "signal_seconds": 30, "max_requeues": 3}
        (file := self.folder / "mine.yaml").write_text(json.dumps(base | {"python": str(self.folder / "rank")} | keys))
        return file

    def jobs(self) -> dict[str, Any]:
        with self.queue.changed() as values:
            return values["jobs"]

    def state(self, id_: str) -> str:
        return self.jobs()[id_]["state"]

    def change(self, id_: str, **values: Any) -> None:
        """Give a job another state, reason, nodes, or number of restarts."""
        with self.queue.changed() as all_values:
            all_values["jobs"][id_] |= values

    def run(self, id_: str) -> None:
        self.change(id_, state="RUNNING", reason="None", nodes="node1")

    def forget(self, id_: str, accounted: bool = True) -> None:
        """The controller knows a job no more; accounting may."""
        self.change(id_, known=False, accounted=accounted)

    def tell(self, **values: Any) -> None:
        """`answers`: refusals of the next calls of sbatch, where an empty one is none; `down`: how many calls get no
        answer; `requeue`: why a job cannot be requeued; `accounting`: whether there is any.
        """
        with self.queue.changed() as all_values:
            all_values |= values

    def hold(self) -> Path:
        """The next call of sbatch writes the file that this names, and waits until it is gone."""
        (self.queue.folder / "hold").touch()
        return self.queue.folder / "held"

    def calls(self, name: str) -> list[list[str]]:
        """The arguments of each call of a program."""
        file = self.queue.folder / "calls.jsonl"
        lines = map(json.loads, file.read_text().splitlines() if file.exists() else ())
        return [arguments for called, *arguments in lines if called == name]

    def options(self, id_: str) -> dict[str, str]:
        """What was asked of sbatch for a job."""
        return sbatch_options(self.queue.script(id_).read_text())

    def environment(self, id_: str) -> dict[str, str]:
        """What Slurm tells a job's batch script."""
        options, restarts = self.options(id_), self.jobs()[id_]["restarts"]
        nodes = int(options["nodes"])
        main, _, element = id_.partition("_")
        return {
            "FAKE_SLURM_JOB": id_,
            "SLURM_JOB_ID": str(int(main) + int(element or 0)),
            **({"SLURM_ARRAY_JOB_ID": main, "SLURM_ARRAY_TASK_ID": element} if element else {}),
            **({"SLURM_RESTART_COUNT": str(restarts)} if restarts else {}),
            "SLURM_JOB_NODELIST": "node1" if nodes == 1 else f"node[1-{nodes}]",
            "SLURM_JOB_NUM_NODES": str(nodes),
            "SLURM_NTASKS": str(nodes * int(options["ntasks-per-node"])),
            "SLURM_CPUS_PER_TASK": options["cpus-per-task"],
        }

    def start(self, id_: str) -> None:
        """Run a job's batch script."""
        self.run(id_)
        options, environment = self.options(id_), self.environment(id_)
        with (
            expand(options["output"], environment).open("ab") as out,
            expand(options["error"], environment).open("ab") as error,
        ):
            values = {"env": os.environ | environment, "stdout": out, "stderr": error, "start_new_session": True}
            self.running[id_] = subprocess.Popen(["bash", str(self.queue.script(id_))], **values)

    def wait(self, id_: str) -> int:
        """Wait until the batch script has ended; its exit code."""
        code = self.running[id_].wait(60)
        if self.state(id_) == "RUNNING":
            self.change(id_, state="FAILED" if code else "COMPLETED")
        return code

    def until(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def end_all(self) -> None:
        for process in self.running.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def typed(*arguments: object, code: int = 0) -> str:
    """What `support.cluster.dskd` returns, without the start of another process."""
    from dskd.cli import main  # not for the programs, which start quickly without any package

    out, error, before = StringIO(), StringIO(), sys.argv
    sys.argv = ["dskd", *map(str, arguments)]
    try:
        with redirect_stdout(out), redirect_stderr(error):
            main()
    except SystemExit as end:
        found = end.code or 0
    finally:
        sys.argv = before
    assert found == code, out.getvalue() + error.getvalue()
    return error.getvalue().strip() if code else out.getvalue()


def submitted(*arguments: object) -> list[Path]:
    """Run directories of what `dskd submit ARGUMENTS` submits."""
    return [Path(line.split(": ", 1)[1]) for line in typed("submit", *arguments).splitlines()]


if __name__ == "__main__":
    program(Path(sys.argv[2]), sys.argv[1], sys.argv[3:])
