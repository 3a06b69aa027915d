"""All kernels compile for the GPUs that they are for, and no thread spills its registers. No GPU is needed."""

import json
import os
import subprocess
import sys
from pathlib import Path

KERNELS = {"statistics", "mixtures", "tails", "gradient", "count", "sum_up", "signs", "carry"}


def test_kernels_compile_without_spills(tmp_path):
    """In processes of their own, side by side: in this one Triton interprets."""
    script, environment = Path(__file__).with_name("compiling.py"), os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    started = {
        capability: subprocess.Popen(
            [sys.executable, str(script), str(capability)], env=environment, stdout=subprocess.PIPE, text=True
        )
        for capability in (80, 90)
    }
    for capability, process in started.items():
        told, _ = process.communicate()
        print(f"sm_{capability}", told, sep="\n")
        assert process.returncode == 0
        found = [json.loads(line) for line in told.splitlines()]
        assert {each["kernel"] for each in found} == KERNELS
        assert {each["spilled bytes"] for each in found} == {0}
