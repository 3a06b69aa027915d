"""Losses: torch only. `METHODS` is the one table of training methods."""

from typing import Any

from dskd.losses.dskd import Dskd
from dskd.losses.dskd_cma import DskdCma
from dskd.losses.dskd_v2 import DskdV2
from dskd.losses.kd import Kd
from dskd.losses.method import Method
from dskd.losses.mined import Mined
from dskd.losses.sft import Sft
from dskd.losses.uld import Uld

METHODS: dict[str, type[Method[Any]]] = {
    "sft": Sft,
    "kd": Kd,
    "uld": Uld,
    "mined": Mined,
    "dskd": Dskd,
    "dskd_cma": DskdCma,
    "dskd_v2": DskdV2,
    "dskd_v2_eta": DskdV2,
}
