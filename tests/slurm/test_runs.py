"""Real runs on a real cluster: preempted, timed out, their node killed, cancelled; each comes to its end by itself.

They are submitted at once, each group to nodes of its own, since the start of a rank takes ten seconds of a core.
"""

import os
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from cluster import dskd, metrics, outcomes, rank_environments, steps, submit, wait_for
from transformers import AutoModelForCausalLM

from dskd.launch.record import Record
from dskd.launch.status import statuses

FIRST_HALF, SECOND_HALF = {"nodelist": "node[1-2]"}, {"exclude": "node[1-2]"}


@dataclass(frozen=True)
class Runs:
    """Run directories of what was submitted."""

    undisturbed: Path
    preempted: Path
    short_of_time: Path
    on_a_killed_node: Path
    array: list[Path]


@pytest.fixture(scope="module")
def runs(slurm, profile, make_run, tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    distributed = make_run(
        root,
        train={"epochs": 4, "global_batch_size": 8},
        engine={"zero_stage": 3, "persistence_threshold": 0},
        launch={"processes": None, "nodes": 2},
    )
    two_nodes, others = profile(sbatch=FIRST_HALF), profile(sbatch=SECOND_HALF)
    (preempted,) = submit(distributed, "--cluster", two_nodes, "output.name=preempted")
    small = ["method.kind=sft", "launch.processes=1", "launch.nodes=1"]
    slow = ["train.global_batch_size=40", "train.micro_batch_size=1", "train.epochs=60", "launch.hours=0.017"]
    hurried = profile(sbatch=SECOND_HALF, signal_seconds=10)
    (short,) = submit(distributed, "--cluster", hurried, *small, *slow, "output.name=short")
    pair = ["method.kind=sft", "launch.processes=1", "train.epochs=20", "checkpoint.every_steps=5"]
    (killed,) = submit(distributed, "--cluster", others, *pair, "output.name=killed")
    wait_for(preempted, "running", step=3)
    command = ["sbatch", "--partition=high", "--nodelist=node[1-2]", "--nodes=2", "--exclusive", "--time=5"]
    subprocess.run([*command, "--output=/dev/null", "--wrap=sleep 5"], check=True, capture_output=True)
    (undisturbed,) = submit(distributed, "--cluster", two_nodes, "output.name=undisturbed")
    files = []
    for seed in range(20):
        files.append(root / f"seed{seed}.yaml")
        files[-1].write_text(f"extends: run.yaml\ntrain: {{seed: {seed}}}\noutput: {{name: seed{seed}}}\n")
    array = submit(*files, "--cluster", others, "--parallel", 4, *small, "train.max_steps=2")
    return Runs(undisturbed, preempted, short, killed, array)


def test_a_node_killed_takes_nothing_of_the_run_with_it(runs, slurm):
    directory = runs.on_a_killed_node
    status = wait_for(directory, "running", step=12)
    node = subprocess.run(["scontrol", "show", "hostnames", status.nodes], capture_output=True, text=True, check=True)
    victim = node.stdout.split()[-1]
    os.kill(int((slurm / "run" / f"{victim}.pid").read_text()), signal.SIGKILL)
    again = wait_for(directory, "running", step=13) if outcomes(directory)[1:] else None
    deadline = time.monotonic() + 120
    while len(outcomes(directory)) < 2:
        assert time.monotonic() < deadline
        time.sleep(1)
    assert again is None or again.nodes
