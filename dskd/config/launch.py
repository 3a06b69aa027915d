"""Settings of how many processes run, and where."""

from dataclasses import dataclass

from dskd.config.errors import require


@dataclass(frozen=True)
class LaunchConfig:
    processes: int | None = None
    """Processes on this machine; empty means one for each visible GPU, or one without a GPU."""

    def __post_init__(self) -> None:
        require(self.processes is None or self.processes > 0, "processes", f"must be above 0, got {self.processes}")
