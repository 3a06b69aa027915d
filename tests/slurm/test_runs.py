"""Real runs on a real cluster: preempted, timed out, their node killed, cancelled; each comes to its end by itself.

They are submitted at once, each group to nodes of its own, since the start of a rank takes ten seconds of a core.
"""

import math
import os
import signal
import statistics
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from support.cluster import (
    bring_up,
    dskd,
    metrics,
    outcomes,
    rank_environments,
    step_seconds,
    steps,
    submit,
    wait_for,
    wait_until,
)
from transformers import AutoModelForCausalLM

from dskd.rundir.jobs import Jobs

FIRST_HALF, SECOND_HALF = {"nodelist": "node[1-2]"}, {"exclude": "node[1-2]"}


@dataclass(frozen=True)
class Runs:
    """Run directories of what was submitted."""

    undisturbed: Path
    preempted: Path
    ranks: list[dict[str, str]]
    """The environments of its ranks, in their order."""
    on_a_killed_node: Path
    killed_node: str
    array: list[Path]


@pytest.fixture(scope="module")
def runs(slurm, profile, make_run, tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    run = make_run(
        root,
        train={"epochs": 8, "global_batch_size": 8},
        engine={"zero_stage": 3, "persistence_threshold": 0},
        launch={"processes": None, "nodes": 2},
    )
    two_nodes, others = profile(sbatch=FIRST_HALF), profile(sbatch=SECOND_HALF)
    (preempted,) = submit(run, "--cluster", two_nodes, "output.name=preempted")
    long = ["method.kind=sft", "launch.nodes=1", "train.micro_batch_size=1", "checkpoint.every_steps=5"]
    (killed,) = submit(run, "--cluster", others, *long, "train.epochs=30", "eval.every_epochs=30", "output.name=killed")
    wait_for(preempted, "running", step=3)
    ranks = rank_environments(preempted)
    command = ["sbatch", "--partition=high", "--nodelist=node[1-2]", "--nodes=2", "--exclusive", "--time=5"]
    subprocess.run([*command, "--output=/dev/null", "--wrap=sleep 5"], check=True, capture_output=True)
    # After the other, which has fewer steps to be caught in.
    node = kill_a_node(slurm, wait_for(killed, "running", state_step=10).nodes)
    (undisturbed,) = submit(run, "--cluster", two_nodes, "output.name=undisturbed")

    alone = ["method.kind=sft", "launch.processes=1", "launch.nodes=1"]
    files = []
    for seed in range(20):
        files.append(root / f"seed{seed}.yaml")
        files[-1].write_text(f"extends: run.yaml\ntrain: {{seed: {seed}}}\noutput: {{name: seed{seed}}}\n")
    array = submit(*files, "--cluster", others, "--parallel", 4, *alone, "train.max_steps=2")
    wait_until(lambda: len(Jobs.at(killed).starts()) == 2, 200)
    bring_up(slurm)
    return Runs(undisturbed, preempted, ranks, killed, node, array)


def kill_a_node(slurm: Path, nodes: str) -> str:
    """The last one of `nodes` crashes; its name."""
    victim = hosts(nodes)[-1]
    os.kill(int((slurm / "run" / f"{victim}.pid").read_text()), signal.SIGKILL)
    return victim


def test_ranks_find_each_other(runs):
    ranks = runs.ranks
    assert [(e["RANK"], e["LOCAL_RANK"], e["WORLD_SIZE"]) for e in ranks] == [
        (str(i), str(i % 2), "4") for i in range(4)
    ]
    assert [e["SLURMD_NODENAME"] for e in ranks] == ["node1", "node1", "node2", "node2"]
    assert {e["MASTER_ADDR"] for e in ranks} == {"node1"}
    assert len({e["MASTER_PORT"] for e in ranks}) == 1
    assert all(e["CUDA_VISIBLE_DEVICES"] == "0,1" for e in ranks)


def test_a_run_on_a_killed_node_moves_and_goes_on_from_its_last_state(runs):
    status = wait_for(runs.on_a_killed_node, "finished")
    lost, second = Jobs.at(runs.on_a_killed_node).starts()
    assert (lost.outcome, second.outcome) == ("lost", "finished")
    assert status.restarts == (lost.reason,)
    assert runs.killed_node in hosts(lost.nodes)
    assert runs.killed_node not in hosts(second.nodes)
    assert second.step >= 10
    assert steps(runs.on_a_killed_node) == list(range(1, 151))


def test_a_preempted_run_is_bit_identical_to_the_one_left_alone(runs):
    status = wait_for(runs.preempted, "finished")
    wait_for(runs.undisturbed, "finished")
    assert status.restarts == ("preempted",)
    assert len(outcomes(runs.undisturbed)) == 1
    assert metrics(runs.preempted) == metrics(runs.undisturbed)
    assert steps(runs.preempted) == list(range(1, 41))


def test_the_checkpoint_of_four_ranks_loads(runs):
    model = AutoModelForCausalLM.from_pretrained(runs.preempted / "best", dtype=torch.float32)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_twenty_runs_finish_four_at_a_time(runs):
    begun, ended = [], []
    for directory in runs.array:
        assert wait_for(directory, "finished").step == 2
        (start,) = Jobs.at(directory).starts()
        begun.append(start.time)
        ended.append(start.ended)
    at_once = [sum(b <= moment < e for b, e in zip(begun, ended, strict=True)) for moment in begun]
    assert 1 < max(at_once) <= 4
    assert len(set(runs.array)) == 20
    assert len({(directory / "metrics.jsonl").read_text() for directory in runs.array}) == 20
    for directory in runs.array:
        assert f"saved {directory}/" in dskd("logs", directory)


def test_a_run_longer_than_its_time_limit_finishes_by_itself(slurm, profile, make_run, tmp_path):
    """It is told to stop 30 to 60 s after each start, and has steps for 150 s, as fast as this machine is."""
    settings = {"global_batch_size": 200, "micro_batch_size": 1}
    run = make_run(
        tmp_path, method={"kind": "sft"}, train=settings, launch={"processes": 1}, eval={"every_epochs": 999}
    )
    records = tmp_path / "train.jsonl"
    records.write_text(records.read_text() * 5)
    (trial,) = submit(run, "--cluster", profile(), "output.name=trial", "train.epochs=4")
    wait_for(trial, "finished")
    count = math.ceil(150 / statistics.median(step_seconds(trial)))
    hurried = profile(hours=2 / 60, signal_seconds=60)
    (directory,) = submit(run, "--cluster", hurried, "output.name=short", f"train.epochs={count}")
    status = wait_for(directory, "finished", timeout=900)
    assert len(status.restarts) >= 2
    assert set(status.restarts) == {"time limit"}
    assert steps(directory) == list(range(1, count + 1))


def hosts(nodes: str) -> list[str]:
    command = ["scontrol", "show", "hostnames", nodes]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
