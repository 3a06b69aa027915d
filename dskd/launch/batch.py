"""What the batch script runs before and after the ranks: python -m dskd.launch.batch begin|finish FOLDER [CODE].

`begin` writes the start down, or refuses it. `finish` writes its end down and requeues the job where that helps. Both
run in the batch script and not in a rank, so that the decision is made once, whichever rank or node is gone.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

from dskd.config.errors import UserError
from dskd.launch import slurm
from dskd.launch.ranks import free_port, new_secret
from dskd.launch.task import ASKED
from dskd.rundir.jobs import Ending, Job, Jobs, Meeting, Start
from dskd.rundir.layout import runs_file
from dskd.rundir.read import is_complete

PREEMPTED = "preempted"
SLURM_SIGNALS_EARLY = 90.0
"""Seconds that the signal before the time limit may come earlier than asked for."""


def main() -> None:
    verb, folder = sys.argv[1], Path(sys.argv[2])
    try:
        jobs = Jobs.at(run_directory(folder))
        sys.exit(begin(jobs) if verb == "begin" else finish(jobs, int(sys.argv[3])))
    except UserError as error:
        print(f"dskd: {error}", file=sys.stderr)
        sys.exit(2)


def run_directory(folder: Path) -> Path:
    """The run directory of this job, or of this element of an array."""
    return Path(runs_file(folder).read_text().splitlines()[int(os.environ.get("SLURM_ARRAY_TASK_ID", "0"))])


def begin(jobs: Jobs) -> int:
    """Write a start down; its number goes to stdout, for the ranks."""
    job = submitted(jobs)
    jobs.clear_ending()
    restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    start = jobs.add_start(slurm_id(), os.environ["SLURM_JOB_NODELIST"])
    if restarts > job.max_requeues:
        return fail(jobs, start, f"started again {job.max_requeues} times (max_requeues of the cluster profile)")
    jobs.write_meeting(Meeting(free_port(), new_secret()))  # this script runs on the node of rank 0
    print(start.number)
    return 0


def finish(jobs: Jobs, code: int) -> int:
    """Write the end of a start down, requeue the job where it helps; the batch script's exit code."""
    job, start = submitted(jobs), jobs.starts()[-1]
    if jobs.is_cancelled() and not is_complete(jobs.directory):  # the request may come with the last step
        jobs.end_start(start.number, "cancelled", f"cancelled; {jobs.kept()}")
        slurm.cancel(slurm_id())
        return code
    ending = jobs.ending() or Ending(False, f"srun ended with {code}")
    if ending.again:
        reason = why_stopped(ending.reason, job, time.time() - start.time)
        problem = why_not_again(jobs, job, reason)
        if problem is not None:
            return fail(jobs, start, problem)
        jobs.end_start(start.number, "again", reason)
        try:
            slurm.patiently(lambda: slurm.run("scontrol", "requeue", slurm_id()))
        except subprocess.CalledProcessError as error:
            return fail(jobs, start, f"{reason}; requeue refused: {slurm.one_line(error.stderr)}")
        time.sleep(600)  # until Slurm ends this script
    if code:
        return fail(jobs, start, ending.reason, code)
    jobs.end_start(start.number, "finished", "")
    return 0


def why_stopped(why: str, job: Job, seconds: float) -> str:
    """A job that was asked to stop early was preempted; one that was asked when its time was up, was not."""
    if why != ASKED:
        return why
    in_time = seconds < job.minutes * 60 - job.signal_seconds - SLURM_SIGNALS_EARLY
    return PREEMPTED if in_time else "time limit"


def why_not_again(jobs: Jobs, job: Job, reason: str) -> str | None:
    """Why another start would be a waste; None where it makes sense. Preemption is no fault of the run."""
    if int(os.environ.get("SLURM_RESTART_COUNT", "0")) >= job.max_requeues:
        return f"{reason}; started again {job.max_requeues} times already (max_requeues of the cluster profile)"
    *before, now = jobs.starts()
    stuck = [s for s in before[-1:] if s.job == now.job and s.state == now.state and s.outcome == "again"]
    if reason != PREEMPTED and jobs.state() == now.state and any(s.reason != PREEMPTED for s in stuck):
        hint = "; a longer launch.hours may help" if reason == "time limit" else ""
        return f"{reason}; two starts in a row made no progress: {jobs.kept()}{hint}"
    return None


def fail(jobs: Jobs, start: Start, reason: str, code: int = 1) -> int:
    jobs.end_start(start.number, "failed", reason)
    print(f"dskd: {reason}", file=sys.stderr)
    return code


def submitted(jobs: Jobs) -> Job:
    job = jobs.read()
    if job is None:
        raise UserError(f"{jobs.folder.path}: no job.json: was the run directory deleted after it was submitted?")
    return job


def slurm_id() -> str:
    """The id that names this job to Slurm, 12 or 12_3."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]


if __name__ == "__main__":
    main()
