"""Signals while the thread writes a state or a model: what is there is whole, and the run ends as if never."""

import random
import signal
from pathlib import Path

import pytest
from support.compare import figures, lines, newest_state, steps
from support.starts import Start, finish

from dskd.checkpoint.retention import model_problem
from dskd.rundir.files import sha256

pytestmark = pytest.mark.faults
WAYS = {
    "memory": (1, ["engine.zero_stage=0"]),
    "memory of two ranks": (2, ["engine.zero_stage=2"]),
    "scratch": (1, ["engine.zero_stage=3"]),
}
KILL, TERM = signal.SIGKILL, signal.SIGTERM
MOMENTS = [
    *(("state", 0.0, KILL), ("state", 0.4, KILL), ("state", 0.95, KILL), ("state", 0.4, TERM)),
    *(("model", 0.3, KILL), ("model", 0.9, TERM)),
]
"""Whose file is being written, how much of it is there, and the signal that comes then."""


@pytest.fixture(scope="module")
def run_file(make_run, tiny, tmp_path_factory):
    """20 steps, five an epoch; a student whose state of 120 MB takes longer to write than a step."""
    shape = {"hidden_size": 512, "num_hidden_layers": 4, "intermediate_size": 1024}
    return make_run(
        tmp_path_factory.mktemp("saving"),
        student={"path": tiny("llama", **shape)},
        data={"max_length": 32, "max_prompt_length": 16},
        method={"kind": "sft"},
        train={"epochs": 4, "global_batch_size": 8, "micro_batch_size": 4},
        checkpoint={"every_steps": 2, "keep_last": 2},
    )


def size_of(folder: Path, pattern: str) -> int:
    """Bytes of the largest of some files, which may go while one looks; -1 without any."""
    sizes = [-1]
    for file in folder.glob(pattern):
        try:
            sizes.append(file.stat().st_size)
        except FileNotFoundError:
            continue
    return max(sizes)


def sums(directory: Path) -> dict[str, str]:
    """sha256 of the kept models' weights and of the newest state's; which steps older ones have depends on the disk."""
    newest = directory / "resume" / (directory / "resume" / "LATEST").read_text().strip()
    files = [*directory.glob("epoch*/*.safetensors"), *newest.glob("*.safetensors")]
    return {str(file.relative_to(directory)): sha256(file) for file in files}


@pytest.mark.parametrize("way", WAYS)
def test_a_signal_while_the_thread_writes_leaves_the_state_before(way, run_file, tmp_path):
    ranks, settings = WAYS[way]
    settings = [*settings, f"output.root={tmp_path}/out"]
    finish(tmp_path / "log0", "train", run_file, *settings, "output.name=whole", ranks=ranks)
    whole = next(tmp_path.glob("out/*/*/whole"))
    cut = whole.with_name("cut")
    if way == "scratch":
        settings.append(f"checkpoint.scratch_dir={tmp_path}/scratch")
    sizes = {
        "state": ("resume/.step*/rank*.safetensors", size_of(whole, "resume/step*/rank0.safetensors")),
        "model": (".epoch*/model.safetensors", size_of(whole, "epoch*/model.safetensors")),
    }
    moments = random.Random(way).sample(MOMENTS, len(MOMENTS))
    came = 0
    for what, share, number in moments:
        pattern, size = sizes[what]
        before = newest_state(cut)["step"] if (cut / "resume" / "LATEST").exists() else 0
        done = steps(cut)
        start = Start(tmp_path / "log1", "train", run_file, *settings, "output.name=cut", ranks=ranks)
        written = start.until(  # not what the last start has left
            lambda done=done, pattern=pattern, least=share * size: steps(cut) > done and size_of(cut, pattern) > least
        )
        start.send(number)
        codes = start.wait()
        assert codes in ([-signal.SIGKILL] * ranks, [75] * ranks, [0] * ranks), start.text()[-3000:]
        came += written and codes != [0] * ranks
        folders = [*cut.glob("resume/step*"), *cut.glob("epoch*")]
        assert [model_problem(folder) for folder in folders] == [None] * len(folders)
        now = newest_state(cut)["step"] if (cut / "resume" / "LATEST").exists() else 0
        assert before <= now <= steps(cut)
        if codes == [75] * ranks and lines(cut):
            assert now == lines(cut)[-1]["step"]
    finish(tmp_path / "log1", "train", run_file, *settings, "output.name=cut", ranks=ranks)
    assert came >= 4
    assert figures(cut) == figures(whole)
    assert sums(cut) == sums(whole)
    assert list(cut.glob("**/.*.partial")) == []
