"""A teacher's cache under signals, and runs that read from it: made on some ranks, stopped, gone on with."""

import signal

import pytest
import torch
from safetensors.torch import load_file
from support.compare import figures, steps
from support.starts import Start, finish
from support.tiny import varied_records, write_records
from torch import Tensor

from dskd.rundir.layout import RunDirectory
from dskd.rundir.shard import read_shard

pytestmark = pytest.mark.faults


@pytest.fixture
def run_file(make_run, tmp_path):
    file = make_run(
        tmp_path,
        train={"epochs": 4, "global_batch_size": 8},
        engine={"persistence_threshold": 0},
        checkpoint={"every_steps": 2},
    )
    write_records(tmp_path / "train.jsonl", varied_records(40))
    return file


def cached_keys(root) -> list[bytes]:
    files = root.glob("outputs/cache/teacher-*/states-*")
    return [bytes(key.tolist()) for file in files for key in load_file(file)["keys"]]


def cached_states(root) -> dict[bytes, Tensor]:
    found = {}
    for file in root.glob("cache/teacher-*/states-*"):
        piece = load_file(file)
        rows = torch.split(piece["states"], piece["offsets"].diff().tolist())
        found |= {bytes(key.tolist()): own for key, own in zip(piece["keys"], rows, strict=True)}
    return found


def test_ranks_that_share_one_copy_make_what_a_whole_one_makes(run_file, tmp_path):
    """With three of them, some have less to do than others."""
    made = []
    for ranks in (1, 3):
        root = tmp_path / str(ranks)
        root.mkdir()
        finish(root / "log", "teacher", "cache", run_file, f"output.root={root}", ranks=ranks)
        made.append(cached_states(root))
        (ends,) = root.glob("cache/teacher-*/ends.safetensors")
        made.append(load_file(ends))
    for alone, shared in (made[::2], made[1::2]):
        assert len(alone) > 1
        torch.testing.assert_close(shared, alone, rtol=1e-4, atol=1e-5)


def test_stopped_it_keeps_what_it_made_and_goes_on(run_file, tmp_path):
    write_records(tmp_path / "train.jsonl", varied_records(8_000))
    (log := tmp_path / "log").touch()
    output = tmp_path / "told"
    start = Start(log, "teacher", "cache", run_file, "--shard", "0/4", "--output", output, ranks=2)
    start.until(lambda: list(tmp_path.glob("outputs/cache/teacher-*/ends.safetensors")))
    start.send(signal.SIGTERM)
    assert start.wait() == [75, 75], start.text()
    assert "stopped as asked; go on with the same command" in start.text()
    kept = len(cached_keys(tmp_path))
    told = read_shard(RunDirectory(output))
    assert told.made == kept < told.wanted
    said = finish(log, "teacher", "cache", run_file, "--shard", "0/4", ranks=1).splitlines()[-1]
    there, made = (int(said.split()[i].replace(",", "")) for i in (2, 4))
    assert there == kept + made == told.wanted
    assert len(set(cached_keys(tmp_path))) == there
    assert 1500 < there < 2500


def test_two_tasks_at_one_shard_do_not_collide(run_file, tmp_path):
    both = [Start(tmp_path / f"log{i}", "teacher", "cache", run_file) for i in range(2)]
    codes = [start.wait()[0] for start in both]
    assert sorted(codes) in ([0, 2], [0, 0])  # the second may have come when the first was done
    refused = [start.text() for start, code in zip(both, codes, strict=True) if code == 2]
    assert all("dskd: --shard: 0/1 of " in text and "is in use by" in text for text in refused)
    assert len(cached_keys(tmp_path)) == len(set(cached_keys(tmp_path))) == 40


def test_a_run_from_the_cache_goes_on_bit_identical(run_file, tmp_path):
    finish(tmp_path / "log", "teacher", "cache", run_file, ranks=2)
    settings = ["teacher.backend=cache", "data.workers=1"]
    finish(tmp_path / "log", "train", run_file, *settings, "output.name=whole", ranks=2)
    (whole,) = tmp_path.glob("outputs/*/*/whole")
    for number, until in ((signal.SIGTERM, 3), (signal.SIGKILL, 9)):
        start = Start(tmp_path / "log", "train", run_file, *settings, "output.name=cut", ranks=2)
        start.until(lambda until=until: steps(whole.with_name("cut")) >= until)
        start.send(number)
        start.wait()
    finish(tmp_path / "log", "train", run_file, *settings, "output.name=cut", ranks=2)
    assert figures(whole.with_name("cut")) == figures(whole)


def test_a_run_may_change_to_the_cache_and_back(run_file, tmp_path):
    finish(tmp_path / "log", "teacher", "cache", run_file)
    finish(tmp_path / "log", "train", run_file, "output.name=whole")
    (whole,) = tmp_path.glob("outputs/*/*/whole")
    cut = whole.with_name("cut")
    for backend, until in (("resident", 4), ("cache", 11), ("resident", 20)):
        start = Start(tmp_path / "log", "train", run_file, f"teacher.backend={backend}", "output.name=cut")
        start.until(lambda until=until: steps(cut) >= until)
        start.send(signal.SIGTERM)
        assert start.wait() in ([75], [0]), start.text()
    expected, found = ([line["loss"] for line in figures(run) if "loss" in line] for run in (whole, cut))
    assert len(found) == 20
    assert found == pytest.approx(expected, rel=1e-4)
