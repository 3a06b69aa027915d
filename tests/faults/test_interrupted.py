"""Runs that are interrupted at random moments, ten times each, end exactly like the run that never was."""

import random
import signal
import time
from pathlib import Path

import pytest
from support.compare import figures, lines, newest_state, steps
from support.starts import Start, finish

from dskd.rundir.files import sha256

pytestmark = pytest.mark.faults
CONFIGURATIONS = {
    "sft-zero0": ["method.kind=sft", "engine.zero_stage=0"],
    "sft-zero3": ["method.kind=sft", "engine.zero_stage=3"],
    "dskd_cma-zero0": ["method.kind=dskd_cma", "engine.zero_stage=0"],
    "dskd_cma-zero3": ["method.kind=dskd_cma", "engine.zero_stage=3"],
    "lora-zero0": ["method.kind=sft", "student.lora={rank: 4}", "engine.zero_stage=0"],
    "lora-zero3": ["method.kind=sft", "student.lora={rank: 4}", "engine.zero_stage=3"],
}
STEPS, PER_EPOCH = 50, 5


def sums(directory: Path) -> dict[str, str]:
    """sha256 of the kept models' weights and of the newest state's; which steps older ones have depends on the disk."""
    newest = directory / "resume" / (directory / "resume" / "LATEST").read_text().strip()
    files = [*directory.glob("epoch*/*.safetensors"), *newest.glob("*.safetensors")]
    return {str(file.relative_to(directory)): sha256(file) for file in files}


@pytest.fixture(scope="module")
def run_file(make_run, tmp_path_factory):
    return make_run(
        tmp_path_factory.mktemp("faults"),
        train={"epochs": STEPS // PER_EPOCH, "global_batch_size": 8},
        engine={"persistence_threshold": 0},
        checkpoint={"every_steps": 2, "keep_last": 2},
        eval={"every_epochs": 2, "generate": True, "generation": {"max_length": 36, "max_prompt_length": 32}},
    )


def moment(start: Start, directory: Path, where: str, chance: random.Random) -> None:
    """Wait for a random moment of a kind, in this start of a run."""
    done, states = steps(directory), directory / "resume"
    if where == "save":
        start.until(lambda: steps(directory) > done and any(states.glob(".step*")))
    elif where == "evaluation":
        start.until(lambda: steps(directory) > done and lines(directory)[-1].get("step", 1) % (2 * PER_EPOCH) == 0)
        time.sleep(chance.uniform(0, 0.2))
    elif where == "epoch":
        start.until(lambda: steps(directory) > done and lines(directory)[-1].get("step", 1) % PER_EPOCH == 0)
    else:
        start.until(lambda: steps(directory) >= done + chance.randint(1, 3))
        time.sleep(chance.uniform(0, 0.1))


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_interrupted_ten_times_it_ends_as_if_never(name, run_file, tmp_path):
    settings = [*CONFIGURATIONS[name], f"output.root={tmp_path}"]
    ranks = 2 if name.startswith("dskd_cma-zero3") else 1
    finish(tmp_path / "log0", "train", run_file, *settings, "output.name=whole", ranks=ranks)
    chance, kinds = random.Random(name), ["forward", "save", "evaluation", "epoch", "forward"]
    kills = [(where, number) for where in kinds for number in (signal.SIGTERM, signal.SIGKILL)]
    chance.shuffle(kills)
    directory = next(tmp_path.glob("*/*/whole")).with_name("cut")
    came = 0
    for where, number in kills:
        start = Start(tmp_path / "log1", "train", run_file, *settings, "output.name=cut", ranks=ranks)
        moment(start, directory, where, chance)
        start.send(number)
        codes = start.wait()
        came += codes != [0] * ranks
        assert codes in ([-signal.SIGKILL] * ranks, [75] * ranks, [0] * ranks), start.text()[-3000:]
        if codes == [75] * ranks and lines(directory):  # no step will be computed twice
            assert newest_state(directory)["step"] == lines(directory)[-1]["step"]
    finish(tmp_path / "log1", "train", run_file, *settings, "output.name=cut", ranks=ranks)
    assert came >= 8
    assert figures(directory) == figures(directory.with_name("whole"))
    assert sums(directory) == sums(directory.with_name("whole"))
