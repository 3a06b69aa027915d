"""Who may join the ranks of a run, and where they listen."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dskd.launch.ranks import free_port, new_secret, rank_environment

MEMBER = """
import sys
from dskd.engine import distributed
ranks = distributed.start()
print(ranks.gather(ranks.rank), flush=True)
sys.stdin.readline()
distributed.stop()
"""
# Another process of this machine that has found out the port, and does what a rank does.
INTRUDER = """
import sys, datetime
import torch.distributed as dist
store = dist.TCPStore(sys.argv[1], int(sys.argv[2]), 2, False, datetime.timedelta(seconds=4), wait_for_workers=False)
dist.init_process_group("gloo", store=store, rank=1, world_size=2, timeout=datetime.timedelta(seconds=4))
print("joined")
"""


@pytest.fixture
def start():
    started = []

    def start_program(program, *arguments, **environment):
        clean = {k: v for k, v in os.environ.items() if k not in rank_environment(0, 1, 0)}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        command = [sys.executable, "-c", program, *map(str, arguments)]
        started.append(subprocess.Popen(command, env=clean | environment, **pipes))
        return started[-1]

    yield start_program
    for process in started:
        process.kill()
        process.communicate()


def listeners(*pids: int) -> set[str]:
    """Addresses on which these processes listen, as the kernel tells them."""
    inodes = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            target = str(link.readlink())
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and words[9] in inodes:
                found.add(words[1].partition(":")[0])
    return found


def test_the_ranks_of_one_machine_listen_on_loopback_alone(start):
    port, secret = free_port(), new_secret()
    members = [start(MEMBER, **rank_environment(rank, 2, port, secret)) for rank in range(2)]
    assert [member.stdout.readline() for member in members] == ["[0, 1]\n"] * 2
    found = listeners(*(member.pid for member in members))
    assert found
    assert found <= {"0100007F", "00000000000000000000000001000000"}  # 127.0.0.1 and ::1
    for member in members:
        member.communicate("\n", timeout=30)
        assert member.returncode == 0


@pytest.mark.parametrize("knows", ["the port alone", "a wrong secret"])
def test_who_does_not_know_the_secret_joins_no_group(start, knows):
    port, secret = free_port(), new_secret()
    first = start(MEMBER, **rank_environment(0, 2, port, secret))
    if knows == "the port alone":
        intruder = start(INTRUDER, "127.0.0.1", port)
    else:
        intruder = start(MEMBER, **rank_environment(1, 2, port, new_secret()))
        time.sleep(3)
    if knows == "the port alone":
        assert intruder.wait(60) != 0
        assert "joined" not in intruder.stdout.read()
    assert first.poll() is None
    second = start(MEMBER, **rank_environment(1, 2, port, secret))
    assert [member.stdout.readline() for member in (first, second)] == ["[0, 1]\n"] * 2
    for member in (first, second):
        member.communicate("\n", timeout=30)
        assert member.returncode == 0


def test_a_member_that_cannot_prove_itself_ends_the_start(start):
    """Where one came through the store all the same, the ranks notice before they exchange anything."""
    port = free_port()
    tampered = MEMBER.replace("ranks = ", "from dskd.engine import rendezvous\nrendezvous.proof = forged\nranks = ")
    tampered = "forged = lambda secret, nonce, rank: bytes(32)\n" + tampered
    secret = new_secret()
    honest = start(MEMBER, **rank_environment(0, 2, port, secret))
    other = start(tampered, **rank_environment(1, 2, port, secret))
    _, error = honest.communicate(timeout=60)
    assert honest.returncode != 0
    assert "what joined as rank 1 does not know this run's secret" in error
    other.kill()
