"""Where a run's teacher comes from."""

from typing import Any

from dskd.config.models import TeacherConfig
from dskd.config.run import RunConfig
from dskd.engine.distributed import Ranks
from dskd.teachers.cached import load_cached
from dskd.teachers.resident import load_resident
from dskd.teachers.sharded import load_sharded
from dskd.teachers.teacher import Teacher


def load_teacher(run: RunConfig, settings: TeacherConfig, tokenizer: Any, ranks: Ranks) -> Teacher:
    """The teacher as its settings say. Raises `UserError` for one that does not fit. Collective."""
    if settings.backend == "cache":
        return load_cached(run, settings, tokenizer, ranks)
    if settings.backend == "sharded":
        return load_sharded(settings, tokenizer, run.engine.precision, ranks)
    return load_resident(settings, tokenizer, run.engine.precision, ranks.device)
