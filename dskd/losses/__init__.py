"""Losses: torch only. `METHODS` is the one table of training methods."""

from dskd.losses.dskd_cma import DskdCma
from dskd.losses.kd import Kd
from dskd.losses.method import Method
from dskd.losses.sft import Sft

METHODS: dict[str, type[Method]] = {
    "sft": Sft,
    "kd": Kd,
    "dskd_cma": DskdCma,
}
