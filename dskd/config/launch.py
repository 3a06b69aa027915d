"""Settings of how many processes run, and where."""

from dataclasses import dataclass

from dskd.config.errors import require, require_at_most

MOST_HOURS = 24 * 366
"""Of one start: a year."""


@dataclass(frozen=True)
class LaunchConfig:
    processes: int | None = None
    """Processes on each machine; empty means one for each GPU (of the cluster profile, or visible), or one without."""
    nodes: int = 1
    """Machines of a submitted run; `dskd train` itself starts processes on this machine only."""
    hours: float | None = None
    """Time limit of each start of a submitted run; empty takes the cluster profile's."""

    def __post_init__(self) -> None:
        require(self.processes is None or self.processes > 0, "processes", f"must be above 0, got {self.processes}")
        require(self.nodes > 0, "nodes", f"must be above 0, got {self.nodes}")
        require(self.hours is None or self.hours > 0, "hours", f"must be above 0, got {self.hours}")
        require_at_most(self, 1024, "processes")
        require_at_most(self, 100_000, "nodes")
        require_at_most(self, MOST_HOURS, "hours")
