"""Submission: check all that can be checked here, write it into the run directories, and hand it to sbatch."""

import errno
import fcntl
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr
from dataclasses import replace
from io import StringIO
from pathlib import Path

from submitit import SlurmExecutor
from submitit.core.utils import FailedJobError

from dskd.config.cluster import ClusterConfig
from dskd.config.errors import UserError, require
from dskd.config.load import to_yaml
from dskd.launch import slurm
from dskd.launch.container import plain_name
from dskd.launch.request import Request
from dskd.launch.task import Task
from dskd.rundir.files import private_folder, write_text
from dskd.rundir.jobs import Job, Jobs
from dskd.rundir.layout import RunDirectory, arrays_folder, runs_file


class Executor(SlurmExecutor):
    """submitit's, which also writes batch scripts where there is no Slurm."""

    @classmethod
    def affinity(cls) -> int:
        return 2

    def script(self, runs: int) -> str:
        """The batch script for so many runs; more than one make an array."""
        count = {"map_count": runs} if runs > 1 else {}
        before, self.parameters = self.parameters, self.parameters | count
        text = self._make_submission_file_text(self._submitit_command_str, "")
        self.parameters = before
        return text


def submit(
    requests: Sequence[Request],
    cluster_name: str,
    cluster: ClusterConfig,
    parallel: int | None = None,
    after: Sequence[str] = (),
) -> list[str]:
    """Submit one job, or several as an array of which `parallel` run at a time; returns Slurm's ids.

    Args:
        after: jobs that must have finished well before; if one cannot any more, Slurm cancels these.

    Raises:
        UserError: where a run is in the queue already, or sbatch refuses.
    """
    slurm.require_slurm()
    runs = [Jobs.at(request.directory) for request in requests]
    with claimed(runs):
        refuse_active(runs)
        folder = submission_folder(requests)
        executor = batch_executor(requests, cluster, folder, parallel, after)
        with restored(runs):
            for jobs, request in zip(runs, requests, strict=True):
                jobs.folder.cancel.unlink(missing_ok=True)
                jobs.write_file(jobs.folder.cluster, to_yaml(cluster))
                jobs.write_file(jobs.folder.script, executor.script(len(requests)))
                if request.settings is not None:
                    jobs.write_file(jobs.folder.settings, request.settings)
                jobs.write(job_of(request, cluster_name, cluster))
            private_folder(folder)
            write_text(runs_file(folder), "".join(f"{request.directory}\n" for request in requests))
            ids = slurm.patiently(lambda: hand_over(executor, requests))
            for jobs, request, id_ in zip(runs, requests, ids, strict=True):
                jobs.write(replace(job_of(request, cluster_name, cluster), id=id_, submitted=time.time()))
    return ids


def hand_over(executor: Executor, requests: Sequence[Request]) -> list[str]:
    """Ids of the submitted jobs. Raises `slurm.Unreachable`, or `UserError` with sbatch's words."""
    try:
        with redirect_stderr(StringIO()), executor.batch():  # submitit prints what it then raises
            jobs = [executor.submit(Task(request.directory, request.command)) for request in requests]
    except FailedJobError as error:
        said = str(error)
        slurm.raise_unreachable(said)
        raise slurm.refused(said) from None
    return [str(job.job_id) for job in jobs]


def submission_text(
    requests: Sequence[Request], cluster: ClusterConfig, parallel: int | None, after: Sequence[str] = ()
) -> str:
    """What `submit` would hand over, to be read: the command of each run, and the one batch script of them all."""
    executor = batch_executor(requests, cluster, submission_folder(requests), parallel, after)
    commands = [f"# {request.directory}: each rank runs\n{shlex.join(request.command)}" for request in requests]
    return "\n".join([*commands, f"# submitted with sbatch:\n{executor.script(len(requests))}"])


@contextmanager
def claimed(runs: Sequence[Jobs]) -> Iterator[None]:
    """Inside, no one else submits these runs. Raises `UserError` where someone is about to."""
    with ExitStack() as stack:
        for jobs in runs:
            jobs.make_folder()
            file = stack.enter_context(jobs.folder.claim.open("ab"))
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    raise UserError(f"{jobs.directory.path} is being submitted at this moment") from None
                raise
        yield


@contextmanager
def restored(runs: Sequence[Jobs]) -> Iterator[None]:
    """If the submission fails, what is known of an earlier one stays as it was: `dskd resume` would take it."""
    kept = [(jobs, file) for jobs in runs for file in (*jobs.folder.submitted, jobs.folder.cancel)]
    before = [file.read_text(encoding="utf-8") if file.is_file() else None for _, file in kept]
    try:
        yield
    except BaseException:
        for (jobs, file), text in zip(kept, before, strict=True):
            if text is not None:
                jobs.write_file(file, text)
            else:
                file.unlink(missing_ok=True)
        raise


def refuse_active(runs: Sequence[Jobs]) -> None:
    known = {job.id: jobs for jobs in runs if (job := jobs.read()) is not None and job.id is not None}
    for id_ in slurm.queue(list(known)):
        raise UserError(f"{known[id_].directory.path} is in the queue already, as job {id_}; `dskd cancel` ends it")


def job_of(request: Request, cluster_name: str, cluster: ClusterConfig) -> Job:
    return Job(
        cluster=cluster_name,
        command=request.command,
        nodes=request.nodes,
        tasks_per_node=request.tasks_per_node,
        minutes=minutes_of(request.hours),
        signal_seconds=cluster.signal_seconds,
        max_requeues=cluster.max_requeues,
    )


def minutes_of(hours: float) -> int:
    """Slurm counts whole minutes."""
    return max(1, round(hours * 60))


def submission_folder(requests: Sequence[Request]) -> Path:
    """Where submitit's files go: into job/ of a run; for an array beside the runs, into a folder of its own."""
    if len(requests) == 1:
        return RunDirectory(requests[0].directory).job.submitit
    common = Path(os.path.commonpath([request.directory for request in requests]))
    return arrays_folder(common) / f"{time.strftime('%Y%m%d-%H%M%S')}-{socket.gethostname()}-{os.getpid()}"


def batch_executor(
    requests: Sequence[Request], cluster: ClusterConfig, folder: Path, parallel: int | None, after: Sequence[str]
) -> Executor:
    """The executor that writes the batch script. Raises `UserError` where an array's runs differ in what they need."""
    first = requests[0]
    for request in requests[1:]:
        for key in ("nodes", "tasks_per_node", "hours"):
            same = getattr(request, key) == getattr(first, key)
            require(
                same, f"launch.{key}", f"runs submitted together need the same; {request.name} and {first.name} differ"
            )
    executor = Executor(folder=folder, max_num_timeout=cluster.max_requeues)
    executor.update_parameters(**parameters(first, cluster, folder, parallel or len(requests), after))
    return executor


def parameters(
    request: Request, cluster: ClusterConfig, folder: Path, parallel: int, after: Sequence[str]
) -> dict[str, object]:
    """What submitit makes #SBATCH lines of, and what stands before and after srun."""
    tasks = request.tasks_per_node
    share = tasks / cluster.gpus_per_node if cluster.gpus_per_node else 1.0
    options: dict[str, object] = {
        "job_name": plain_name(f"dskd-{request.name}"),
        "time": minutes_of(request.hours),
        "nodes": request.nodes,
        "ntasks_per_node": tasks,
        "cpus_per_task": max(1, int(cluster.cpus_per_node * share) // tasks),
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "gpus_per_node": tasks if cluster.gpus_per_node else None,
        "mem": f"{int(cluster.memory_gb * 1024 * share)}M" if cluster.memory_gb else None,
        "signal_delay_s": cluster.signal_seconds,
        "array_parallelism": parallel,
        "dependency": f"afterok:{':'.join(after)}" if after else None,
        "wckey": None,
        "additional_parameters": {
            "requeue": True,
            **({"kill-on-invalid-dep": "yes"} if after else {}),
            **cluster.sbatch,
        },
        "srun_args": ["--kill-on-bad-exit=1"],
        "setup": setup_lines(cluster, folder),
        "teardown": teardown_lines(folder),
    }
    return {name: value for name, value in options.items() if value is not None or name == "wckey"}


def setup_lines(cluster: ClusterConfig, folder: Path) -> list[str]:
    """Before the ranks: modules and environment; whether all nodes see the folder; the start is written down."""
    runs = shlex.quote(str(runs_file(folder)))
    message = shlex.quote(f"dskd: {folder} is not on storage that all nodes share with the login node")
    return [
        *(f"module load {shlex.quote(module)}" for module in cluster.modules),
        *(f"export {name}={shlex.quote(value)}" for name, value in cluster.environment.items()),
        f'srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 test -e {runs} || {{ echo {message} >&2; exit 2; }}',
        f"DSKD_START=$({batch_command('begin', folder)}) || exit",
        "export DSKD_START",
    ]


def teardown_lines(folder: Path) -> list[str]:
    return [f"{batch_command('finish', folder)} $?", "exit"]


def batch_command(verb: str, folder: Path) -> str:
    return shlex.join([sys.executable, "-m", "dskd.launch.batch", verb, str(folder)])
