"""`make bench-gpu` runs; what it measures needs a GPU."""

import json

from bench import gpu, gpu_steps
from dskd.models import compilation


def test_it_runs_without_a_gpu_at_tiny_size(tmp_path, ranks, monkeypatch):
    monkeypatch.setattr(compilation, "BACKEND", "eager")
    for module, name in ((gpu, "REPEATS"), (gpu_steps, "WARM_UP"), (gpu_steps, "STEPS")):
        monkeypatch.setattr(module, name, 1)
    written = tmp_path / "bench-gpu.json"
    gpu.main(["--device", "cpu", "--tiny", "--to", str(written)])
    found = json.loads(written.read_text())
    assert found["device"]
    assert found["heads"].pop("kernels")
    assert set(found["heads"]) == set(gpu.HEADS)
    for name, head in found["heads"].items():
        ours = [head[f"loss_memory_mb={memory_mb}"] for memory_mb in gpu.MEMORY_MB]
        assert all(each["ms"] > 0 and each["over_floor"] > 0 for each in ours)
        assert ("dense, compiled" in head) == (name in gpu.DENSE)
    steps = found["steps"]
    assert len(steps) == 3 * 2 * 2 * 2  # kinds, forms, records, cuts
    assert all(each["seconds"] > 0 and each["tflops"] > 0 for each in steps.values())
    assert {each["padding"] for name, each in steps.items() if "tokens" in name} == {0}
    assert found["saving"]["bytes"] > 0
    assert found["saving"]["written_seconds"] >= found["saving"]["stands_still_seconds"] > 0
