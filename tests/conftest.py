"""Tiny real models and tokenizers, and runs on them.

tiny       session fixture: `tiny(family, ...)` gives the folder of a small saved model.
make_run   session fixture: `make_run(folder, **overrides)` writes records and a run file.
ranks      session fixture: the process group of one process, this one.
"""

import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import settings
from support.tiny import Tiny, write_run
from transformers.utils import logging as hf_logging

from dskd.engine import distributed
from dskd.launch.ranks import free_port, rank_environment

# Triton's interpreter runs the kernels on the CPU. Triton looks at the environment when it is imported, which others do
# too, and when a kernel is defined: both happen here, and what comes after sees nothing of it.
assert "triton" not in sys.modules, "Triton was imported before its interpreter could be chosen"
if find_spec("triton") is not None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        import_module("dskd.losses.kernels.fused")
        import_module("triton.experimental.gluon")  # which Triton would import at the first launch

# It sets up logging when it is imported, and closes what other libraries log to by then: what pytest captures.
import_module("submitit")

hf_logging.disable_progress_bar()
settings.register_profile("untimed", deadline=None)  # machines are noisy
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """`tiny(family, tokenizer=None, tied=None, **config fields)`: the folder of a tiny real model; see `Tiny`."""
    return Tiny(tmp_path_factory.mktemp("tiny"))


MakeRun = Callable[..., Path]


@pytest.fixture(scope="session")
def make_run(tiny: Tiny) -> MakeRun:
    """`make_run(folder, **sections)` writes folder/{train.jsonl, dev.jsonl, run.yaml} and returns the run file.

    See `support.tiny.write_run`.
    """

    def make(folder: Path, **sections: object) -> Path:
        return write_run(tiny, folder, **sections)

    return make


@pytest.fixture(scope="session")
def ranks() -> Iterator[distributed.Ranks]:
    """The process group of a run on one process, in this process, which no command in a test takes for a rank.

    A rank would end with its command, and the test with it.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name, value in rank_environment(0, 1, free_port()).items():
            patch.setenv(name, value)
        started = distributed.start()
        patch.delenv("RANK")
        yield started
        distributed.stop()
