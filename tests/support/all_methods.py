"""Train several run files one after the other, as one rank: ranks start once and not once a method."""

import sys
from pathlib import Path

from dskd.config.load import load_run
from dskd.engine import distributed
from dskd.train import train

ranks = distributed.start()
overrides = [argument for argument in sys.argv[1:] if "=" in argument]
for file in sys.argv[1:]:
    if "=" not in file:
        train(load_run(Path(file), overrides), ranks)
distributed.stop()
