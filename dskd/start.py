"""How a command becomes ranks: this process alone, or the one that starts and supervises several."""

import logging
import os
import sys
import traceback
from typing import NoReturn

from dskd.config.run import RunConfig, accumulation_steps, check_paths
from dskd.config.stopping import UNFINISHED


def start_training(run: RunConfig, force: bool) -> None:
    """Train on as many ranks as the run wants, or as the one rank that this process is."""
    from dskd.engine import watchdog
    from dskd.engine.preemption import Stopped, watch_signals

    check_paths(run)
    if "RANK" not in os.environ:
        processes = run.launch.processes or gpus()
        accumulation_steps(run, processes)
        start_ranks(processes)
    flags = watch_signals()
    watchdog.show_stacks_on_request()
    from dskd.engine import distributed
    from dskd.train import train as train_here

    try:
        train_here(run, distributed.start(flags), force)
    except Stopped:
        distributed.stop()
        raise SystemExit(UNFINISHED) from None
    except RuntimeError as error:
        if watchdog.is_lost_peer(error):
            traceback.print_exc()
            watchdog.end_here("another rank is gone")
        raise
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
