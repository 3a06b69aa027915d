"""`make bench-gpu` runs; what it measures needs a GPU."""

import json

from bench import gpu


def test_it_runs_without_a_gpu_at_tiny_size(tmp_path):
    written = tmp_path / "bench-gpu.json"
    gpu.main(["--device", "cpu", "--tiny", "--to", str(written)])
    found = json.loads(written.read_text())
    assert found["device"]
    assert set(found["heads"]) == set(gpu.HEADS)
    for name, head in found["heads"].items():
        ours = [head[f"loss_memory_mb={memory_mb}"] for memory_mb in gpu.MEMORY_MB]
        assert all(each["ms"] > 0 and each["over_floor"] > 0 for each in ours)
        assert ("dense, compiled" in head) == (name in gpu.DENSE)
