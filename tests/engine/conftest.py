import pytest

from dskd.engine import distributed
from dskd.launch.local import free_port, rank_environment


@pytest.fixture(scope="session")
def ranks():
    """The process group of a run on one process, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in rank_environment(0, 1, free_port()).items():
            patch.setenv(name, value)
        yield distributed.start()
        distributed.stop()
