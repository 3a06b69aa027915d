"""Copies in host memory: apart from what they were made of, used again, and made only where there is room."""

from concurrent.futures import Future
from dataclasses import replace
from threading import Timer

import pytest
import torch

from dskd.checkpoint import host_memory
from dskd.checkpoint.host_memory import HostMemory, free_memory, model_bytes, reserve, room_of
from dskd.checkpoint.shards import state_bytes

CPU = torch.device("cpu")


def test_copies_change_no_more_and_share_no_storage():
    memory = HostMemory(1000, CPU)
    tensors = [torch.rand(3, 5), torch.arange(4), torch.tensor(2.5, dtype=torch.bfloat16), torch.rand(4, 4).T]
    memory.begin()
    copies = [memory.copy(tensor) for tensor in tensors]
    before = [tensor.clone() for tensor in tensors]
    for tensor in tensors:
        tensor.zero_()
    assert all(copy.equal(expected) for copy, expected in zip(copies, before, strict=True))
    assert len({copy.untyped_storage().data_ptr() for copy in copies}) == len(copies)
    assert all(copy.untyped_storage().nbytes() == copy.nbytes for copy in copies)


def test_the_memory_is_used_again_once_what_was_in_it_is_written():
    memory, written = HostMemory(room_of(40), CPU), Future()
    first = memory.copy(torch.ones(10))
    memory.reader = written
    Timer(0.1, written.set_result, [None]).start()
    memory.begin()
    assert written.done()
    assert memory.copy(torch.zeros(10)).data_ptr() == first.data_ptr()


def test_what_has_no_room_is_copied_all_the_same():
    memory, tensor = HostMemory(room_of(40), CPU), torch.ones(11)
    copy = memory.copy(tensor)
    tensor.zero_()
    assert copy.sum() == 11


class Engine:
    """One weight of ten values, as DeepSpeed's stage 0 shows it."""

    optimizer, global_rank, world_size = torch.optim.AdamW([torch.zeros(1)]), 0, 1
    module = torch.nn.Linear(10, 1, bias=False)

    def zero_optimization_stage(self):
        return 0


def test_there_is_room_for_all_that_is_copied():
    module = torch.nn.Linear(10, 3)
    module.register_buffer("scale", torch.ones(2))
    assert model_bytes(module) == room_of(120) + room_of(12) + room_of(8)
    assert state_bytes(Engine(), room_of) == 3 * room_of(40)


def test_copies_are_made_only_where_they_take_at_most_half_of_what_is_free(ranks, monkeypatch):
    size = 3 * room_of(40) + room_of(40)
    for free, fits in ((2 * size, True), (2 * size - 2, False)):
        monkeypatch.setattr(host_memory, "free_memory", lambda free=free: free)
        copies = reserve(Engine(), ranks)
        assert (copies.state is not None, copies.model is not None) == (fits, fits)
        assert ("goes on" if fits else "stands still") in copies.told


def test_ranks_of_one_node_share_what_it_has(ranks, monkeypatch):
    size, others = 4 * room_of(40), []
    monkeypatch.setattr(host_memory, "free_memory", lambda: 3 * size)
    gathered = type(ranks).gather
    monkeypatch.setattr(type(ranks), "gather", lambda self, value: [*gathered(self, value), *others])
    own = (host_memory.boot_id(), size, 3 * size)
    for others[:], fits in (([], True), ([("another", size, 3 * size)], True), ([own], False)):
        assert (reserve(Engine(), replace(ranks)).state is not None) is fits


MEMINFO = "MemTotal: 9000 kB\nMemFree: 10 kB\nMemAvailable: 5000 kB\n"


@pytest.mark.parametrize(
    ("cgroup", "files", "free"),
    [
        ("0::/", {}, 5000 * 1024),
        ("0::/", {"memory.max": "max", "memory.current": "7", "memory.stat": "file 1\nshmem 0"}, 5000 * 1024),
        ("0::/", {"memory.max": "900", "memory.current": "500", "memory.stat": "file 90\nshmem 50"}, 440),
        (
            "0::/job/step",  # the limit is the job's
            {"job/memory.max": "900", "job/memory.current": "500", "job/memory.stat": "anon 500"},
            400,
        ),
        (
            "3:cpu:/x\n2:memory:/job",
            {
                "memory/job/memory.limit_in_bytes": "900",
                "memory/job/memory.usage_in_bytes": "950",
                "memory/job/memory.stat": "total_cache 100\ntotal_shmem 20",
            },
            30,
        ),
    ],
)
def test_what_is_free_is_what_node_and_cgroups_leave(cgroup, files, free, tmp_path):
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "meminfo").write_text(MEMINFO)
    (tmp_path / "proc" / "self" / "cgroup").write_text(cgroup + "\n")
    for name, text in files.items():
        file = tmp_path / "sys" / "fs" / "cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
    assert free_memory(tmp_path) == free


def test_where_nothing_tells_nothing_is_free(tmp_path):
    assert free_memory(tmp_path) == 0
    assert free_memory() > 0
