"""Train several run files one after the other, as one rank: ranks start once and not once a method.

Attention between the models goes over hardly more than a record at a time: ranks have other numbers of groups.
"""

import sys
from pathlib import Path

from dskd.config.load import load_run
from dskd.engine import distributed
from dskd.losses import dskd_cma
from dskd.train import train

dskd_cma.GROUP_BYTES = 2**20
ranks = distributed.start()
overrides = [argument for argument in sys.argv[1:] if "=" in argument]
for file in sys.argv[1:]:
    if "=" not in file:
        train(load_run(Path(file), overrides), ranks)
distributed.stop()
