"""Where a run's teacher comes from."""

from typing import Any

from dskd.config.models import TeacherConfig
from dskd.engine.distributed import Ranks
from dskd.teachers.resident import load_resident
from dskd.teachers.teacher import Teacher


def load_teacher(settings: TeacherConfig, tokenizer: Any, precision: str, ranks: Ranks) -> Teacher:
    """The teacher as its settings say. Raises `UserError` for one that does not fit."""
    return load_resident(settings, tokenizer, precision, ranks.device)
