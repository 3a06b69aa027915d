"""Matrix products of the heads, by whichever library is the fastest for this processor."""

from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


def multiply(left: Tensor, right: Tensor, out: Tensor) -> None:
    """out [n, m] = left [n, k] @ right [k, m].

    In fp32 on an AMD processor by numpy, whose OpenBLAS is up to 1.6 times as fast there as torch's MKL, and as exact.
    """
    if out.device.type == "cpu" and out.dtype == torch.float32 and mkl_is_slow():
        with np.errstate(all="ignore"):  # a loss that is not finite is found, and told, elsewhere
            np.matmul(left.numpy(), right.numpy(), out=out.numpy())
    else:
        torch.mm(left, right, out=out)


@cache
def mkl_is_slow() -> bool:
    """Told by the processor and not by a stopwatch: two starts of one run must compute the same."""
    has_mkl = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
    if not has_mkl or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    about = Path("/proc/cpuinfo")
    return about.exists() and "AuthenticAMD" in about.read_text()
