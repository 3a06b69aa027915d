"""`dskd pipeline` as typed."""

import os
import subprocess
import sys


def typed(*arguments: object) -> subprocess.CompletedProcess[str]:
    """`dskd pipeline ARGUMENTS` on a machine without Slurm."""
    command = [sys.executable, "-m", "dskd", "pipeline", *map(str, arguments)]
    environment = os.environ | {"PATH": "/nowhere"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)
