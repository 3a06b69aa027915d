"""Triton's interpreter runs the kernels on the CPU.

Triton looks at the environment when it is imported and when a kernel is defined: both happen here, and what comes after
sees nothing of it.
"""

import sys
from importlib import import_module

import pytest

assert "triton" not in sys.modules, "Triton was imported before its interpreter could be chosen"
with pytest.MonkeyPatch.context() as patch:
    patch.setenv("TRITON_INTERPRET", "1")
    import_module("dskd.losses.kernels.fused")
    import_module("triton.experimental.gluon")  # which Triton would import at the first launch
