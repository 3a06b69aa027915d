"""How a command becomes ranks: this process alone, or the one that starts and supervises several."""

import logging
import os
import sys
from typing import TYPE_CHECKING, NoReturn

from dskd.config.run import RunConfig, accumulation_steps, check_paths
from dskd.config.stopping import UNFINISHED

if TYPE_CHECKING:
    from dskd.engine.preemption import Flags


def start_training(run: RunConfig, force: bool) -> None:
    """Train on as many ranks as the run wants, or as the one rank that this process is."""
    from dskd.engine import watchdog
    from dskd.engine.preemption import Phase, watch_signals

    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin cost a factor of ten beside other work
    check_paths(run)
    if "RANK" not in os.environ:
        processes = run.launch.processes or gpus()
        accumulation_steps(run, processes)
        start_ranks(processes)
    flags = watch_signals()
    watchdog.show_stacks_on_request()
    limits: dict[Phase, float] = {
        "start": run.train.start_minutes,
        "step": run.train.stall_minutes,
        "save": run.train.save_minutes,
    }
    with watchdog.watchdog(flags, limits):
        train_as_rank(run, flags, force)


def train_as_rank(run: RunConfig, flags: "Flags", force: bool) -> None:
    """Train in this process; a stop that was asked for, and what another start mends, end it with `UNFINISHED`."""
    from dskd.engine import watchdog
    from dskd.engine.preemption import Stopped

    try:
        from dskd.engine import distributed
        from dskd.train import train

        train(run, distributed.start(flags), force)
    except Stopped:
        if os.environ["RANK"] == "0":
            print(f"dskd: stopped as asked; go on with: dskd resume {run.directory}", file=sys.stderr)
        raise SystemExit(UNFINISHED) from None
    except RuntimeError as error:
        reason = watchdog.why_lost(error)
        if reason is None:
            raise
        watchdog.end_here(reason)
    distributed.stop()


def gpus() -> int:
    """One process for each visible GPU, or one without a GPU."""
    from dskd.engine.distributed import visible_gpus

    return max(1, visible_gpus())


def start_ranks(processes: int) -> None:
    """Run this very command as several ranks and leave with their exit code; one process is this one."""
    from dskd.launch.ranks import free_port, rank_environment, run_processes

    if processes > 1:
        raise SystemExit(run_processes(sys.argv[1:], processes))
    os.environ |= rank_environment(0, 1, free_port())


def leave(code: str | int | None) -> NoReturn:
    """End this process. A rank skips the interpreter's own end, which a thread of torch may abort (signal 6)."""
    if "RANK" not in os.environ or isinstance(code, str):
        sys.exit(code)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)
