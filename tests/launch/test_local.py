"""Several ranks of one command: their environment, whose exit code counts, what is shown, and which signals they get.

The command is a small shell script in the place of Python, so that each rank does what the test says.
"""

import os
import signal
import subprocess
import sys
import time

import pytest

from dskd.config.stopping import UNFINISHED
from dskd.launch.ranks import TAIL_LINES, end, exit_code, first_failed, free_port, rank_environment

# A shell lets what it starts in the background ignore SIGQUIT, and a script could not trap it then.
DRIVER = """
import signal, sys
from dskd.launch.ranks import run_processes
signal.signal(signal.SIGQUIT, signal.SIG_DFL)
sys.executable = sys.argv[1]
sys.exit(run_processes(sys.argv[3:], int(sys.argv[2])))
"""
FOREVER = "while :; do sleep 0.02; done"


@pytest.fixture
def start(tmp_path):
    """Start `processes` ranks of a shell script, which runs in the test's folder and finds its rank in $RANK."""
    started = []

    def start_script(script: str, processes: int, *arguments: str, **environment: str) -> subprocess.Popen:
        file = tmp_path / "ranks.sh"
        file.write_text(f"#!/bin/sh\necho $$ > pid$RANK\n{script}\n")
        file.chmod(0o755)
        command = [sys.executable, "-c", DRIVER, str(file), str(processes), *arguments]
        clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "OMP_NUM_THREADS")}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, cwd=tmp_path, env=clean | environment, **pipes))
        return started[-1]

    yield start_script
    for process in started:
        process.kill()


def wait_for(*files) -> None:
    deadline = time.monotonic() + 20
    while not all(file.exists() and file.read_text() for file in files):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_each_rank_knows_its_place(start, tmp_path):
    values = "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR $MASTER_PORT $OMP_NUM_THREADS $*"
    done = start(f'echo "{values}" > told$RANK', 3, "train", "a b.yaml")
    assert done.communicate(timeout=20) == ("", "")
    assert done.returncode == 0
    told = [(tmp_path / f"told{rank}").read_text().split(maxsplit=6) for rank in range(3)]
    assert [words[:4] for words in told] == [[str(rank), str(rank), "3", "127.0.0.1"] for rank in range(3)]
    assert len({words[4] for words in told}) == 1
    assert int(told[0][5]) == max(1, (os.cpu_count() or 1) // 3)
    assert {words[6].strip() for words in told} == {"-m dskd train a b.yaml"}


def test_the_number_of_threads_is_the_user_s_where_it_is_set(start, tmp_path):
    assert start("echo $OMP_NUM_THREADS > threads$RANK", 2, OMP_NUM_THREADS="7").wait(20) == 0
    assert (tmp_path / "threads1").read_text() == "7\n"


def test_only_rank_0_is_heard_while_all_is_well(start):
    done = start("echo out $RANK; echo error $RANK >&2", 3)
    assert done.communicate(timeout=20) == ("out 0\n", "error 0\n")


def test_a_failing_rank_ends_the_others_and_gives_its_code(start, tmp_path):
    done = start(f"test $RANK = 2 && exit 3\n{FOREVER}", 4)
    done.communicate(timeout=20)
    assert done.returncode == 3
    assert not any(runs(int((tmp_path / f"pid{rank}").read_text())) for rank in range(4))


def test_the_end_of_what_a_failing_rank_wrote_is_shown(start):
    done = start(f"test $RANK = 1 && {{ seq 1 100; echo broken >&2; exit 4; }}\n{FOREVER}", 2)
    out, error = done.communicate(timeout=20)
    assert (out, done.returncode) == ("", 4)
    last = [*map(str, range(102 - TAIL_LINES, 101)), "broken"]
    assert error.splitlines() == ["rank 1 failed first; the end of what it wrote:", *last]


@pytest.mark.parametrize("late", [0, 1])
def test_a_mistake_that_all_ranks_notice_is_told_once_by_rank_0(start, late):
    """Even where rank 0 notices it a moment after the others."""
    done = start(f"test $RANK = 0 && sleep 0.{late}\necho dskd: wrong >&2; exit 2", 3)
    assert done.communicate(timeout=20) == ("", "dskd: wrong\n")
    assert done.returncode == 2


def test_a_rank_that_fails_because_another_did_does_not_hide_it(start):
    done = start("test $RANK = 0 && { sleep 0.2; echo connection reset >&2; exit 1; }\necho the cause; exit 3", 2)
    error = done.communicate(timeout=20)[1]
    assert done.returncode == 3
    assert "the cause" in error


@pytest.mark.parametrize("name", ["KILL", "TERM", "SEGV"])
def test_a_rank_that_a_signal_ends_makes_the_run_unfinished(start, name):
    done = start(f"test $RANK = 1 && kill -{name} $$\n{FOREVER}", 2)
    assert "rank 1 failed first" in done.communicate(timeout=20)[1]
    assert done.returncode == UNFINISHED


def test_where_one_rank_is_killed_the_others_show_their_stacks(start):
    die = "until test -e ready0 && test -e ready1; do sleep 0.1; done; kill -KILL $$"
    script = f"trap 'echo at line 7' QUIT\necho > ready$RANK\ntest $RANK = 2 && {{ {die}; }}\n{FOREVER}"
    done = start(script, 3)
    out, error = done.communicate(timeout=20)
    assert out == "at line 7\n"  # rank 0 writes to the terminal itself
    assert "rank 1 was here:\nat line 7" in error


def test_ranks_that_stop_get_the_time_they_need(start, tmp_path):
    done = start(f"test $RANK = 0 && exit {UNFINISHED}\nsleep 2; echo > saved; exit {UNFINISHED}", 2)
    assert done.communicate(timeout=20) == ("", "")
    assert done.returncode == UNFINISHED
    assert (tmp_path / "saved").exists()


def test_a_rank_that_only_lost_another_does_not_hide_why(start):
    done = start(f"test $RANK = 0 && exit {UNFINISHED}\nsleep 1; echo the cause; exit 1", 2)
    assert "the cause" in done.communicate(timeout=20)[1]
    assert done.returncode == 1


@pytest.mark.parametrize("name", ["TERM", "INT", "USR1", "USR2"])
def test_signals_are_passed_on_to_all_ranks(start, tmp_path, name):
    done = start(f"trap 'echo {name} > got$RANK; exit 0' {name}\necho > ready$RANK\n{FOREVER}", 2)
    wait_for(tmp_path / "ready0", tmp_path / "ready1")
    done.send_signal(signal.Signals[f"SIG{name}"])
    assert done.wait(20) == 0
    assert [(tmp_path / f"got{rank}").read_text() for rank in (0, 1)] == [f"{name}\n"] * 2


def test_a_signal_that_ends_the_ranks_makes_the_run_unfinished(start, tmp_path):
    done = start(f"echo > ready$RANK\n{FOREVER}", 2)
    wait_for(tmp_path / "ready0", tmp_path / "ready1")
    done.terminate()
    assert done.wait(20) == UNFINISHED


def test_ranks_that_ignore_the_polite_end_are_killed():
    command = ["/bin/sh", "-c", f"trap '' TERM; echo ready; {FOREVER}"]
    ranks = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(2)]
    assert [rank.stdout.readline() for rank in ranks] == [b"ready\n"] * 2
    end(ranks, patience=0.2)
    assert [rank.returncode for rank in ranks] == [-signal.SIGKILL] * 2


@pytest.mark.parametrize(
    ("codes", "code"),
    [([0, 0], 0), ([None, 2], 2), ([75, 1], 1), ([1, -9], 75), ([75, None], 75), ([2, 2], 2), ([0, 255], 255)],
)
def test_exit_codes(codes, code):
    failed = first_failed(codes, codes)
    assert exit_code(None if failed is None else codes[failed]) == code


def test_a_free_port_can_be_bound_and_is_what_the_ranks_are_told():
    port = free_port()
    assert 1024 <= port < 65536
    assert rank_environment(1, 4, port, "known") == {
        "RANK": "1",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "4",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "DSKD_SECRET": "known",
    }
