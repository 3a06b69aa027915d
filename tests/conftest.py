"""Tiny real models and tokenizers, and runs on them.

tiny       session fixture: `tiny(family, ...)` gives the folder of a small saved model.
make_run   session fixture: `make_run(folder, **overrides)` writes records and a run file.
ranks      session fixture: the process group of one process, this one.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from support.tiny import Tiny, write_run
from transformers.utils import logging as hf_logging

from dskd.engine import distributed
from dskd.launch.ranks import free_port, rank_environment

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
    """The process group of a run on one process, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in rank_environment(0, 1, free_port()).items():
            patch.setenv(name, value)
        yield distributed.start()
        distributed.stop()
