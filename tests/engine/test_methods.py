"""Every method through the whole run: two ranks with accumulation, ZeRO-3 against ZeRO-0, one against many."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dskd.assemble import assemble
from dskd.config.load import load_run
from dskd.launch.ranks import free_port, rank_environment
from dskd.losses import METHODS
from dskd.train import train_step

TOKENS = ["kd", "dskd_cma", "dskd_v2_eta"]
"""Methods that also run with micro-batches of so many tokens: nothing, deviations and counts are taken beforehand."""
WORKER = Path(__file__).parents[1] / "support" / "all_methods.py"


@pytest.fixture(scope="module")
def runs(make_run, tmp_path_factory):
    """metrics.jsonl of each method by (method, ZeRO stage)."""
    root = tmp_path_factory.mktemp("methods")
    files = []
    for kind in METHODS:
        (root / kind).mkdir()
        files.append(str(make_run(root / kind, method={"kind": kind}, train={"max_steps": 3, "global_batch_size": 8})))
    for kind in TOKENS:
        (root / f"{kind}-tokens").mkdir()
        train = {"max_steps": 2, "global_batch_size": 8, "micro_batch_tokens": 100}
        files.append(str(make_run(root / f"{kind}-tokens", method={"kind": kind}, train=train)))
    for stage in (0, 3):
        options = [f"engine.zero_stage={stage}", f"output.name=zero{stage}", "engine.persistence_threshold=0"]
        port = free_port()
        ranks = [
            subprocess.Popen(
                [sys.executable, str(WORKER), *files, *options],
                env=os.environ | rank_environment(rank, 2, port),
                stdout=subprocess.DEVNULL,
            )
            for rank in range(2)
        ]
        assert [rank.wait(300) for rank in ranks] == [0, 0]

    def read(kind, stage):
        (file,) = (root / kind).glob(f"**/zero{stage}/metrics.jsonl")
        return [json.loads(line) for line in file.read_text().splitlines()]

    return read


@pytest.mark.parametrize("kind", METHODS)
def test_zero_3_trains_to_the_losses_of_zero_0(runs, kind):
    expected, actual = runs(kind, 0), runs(kind, 3)
    assert len(expected) == len(actual) == 4
    for a, b in zip(actual[:3], expected[:3], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
    assert actual[3]["dev_loss"] == pytest.approx(expected[3]["dev_loss"], abs=1e-4)


@pytest.mark.parametrize("kind", METHODS)
def test_the_loss_is_the_same_on_two_ranks_and_on_one(runs, kind, make_run, tmp_path, ranks):
    """The global batch is cut alike, whatever the ranks: dskd_cma takes a standard deviation over a micro-batch."""
    run = load_run(make_run(tmp_path, method={"kind": kind}, train={"max_steps": 3, "global_batch_size": 8}))
    training = assemble(run, ranks)
    batches = [training.train(indices) for indices in training.plan.micro_batches(0, 0, 1)]
    figures = train_step(training, 1, batches)
    expected = runs(kind, 0)[0]
    assert all(math.isfinite(value) for value in figures.values())
    assert figures["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    assert figures["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("kind", TOKENS)
@pytest.mark.parametrize("stage", [0, 3])
def test_micro_batches_of_tokens_train_on_two_ranks_as_one_of_all_does_on_one(
    runs, kind, stage, make_run, tmp_path, ranks
):
    sizes = {"max_steps": 2, "global_batch_size": 8, "micro_batch_size": 8}
    training = assemble(load_run(make_run(tmp_path, method={"kind": kind}, train=sizes)), ranks)
    for step, found in enumerate(runs(f"{kind}-tokens", stage)[:2]):
        batches = [training.train(indices) for indices in training.plan.micro_batches(step, 0, 1)]
        expected = train_step(training, step + 1, batches)
        assert found["padding"] == 0 < expected["padding"]
        for name in ("loss", *training.distiller.method.weights):
            assert found[name] == pytest.approx(expected[name], rel=1e-5 if step == 0 else 1e-3)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4 if step == 0 else 1e-2)
