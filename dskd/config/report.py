"""Settings of what a run tells beside its log and metrics.jsonl."""

from dataclasses import dataclass
from typing import Literal

from dskd.config.errors import require

Tracker = Literal["wandb", "mlflow"]


@dataclass(frozen=True)
class ReportConfig:
    trackers: tuple[Tracker, ...] = ()
    """Live trackers that get each figure too, where their packages are installed; their environment variables say where
    they send it. TensorBoard needs no setting."""
    project: str = "dskd"
    """Name of the project in wandb, and of the experiment in mlflow."""

    def __post_init__(self) -> None:
        require(bool(self.project.strip()), "project", "must not be empty")
