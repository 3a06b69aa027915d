"""What a run is made of, as far as its forecast is concerned: read once, from small files."""

from dataclasses import dataclass

from dskd.config.run import RunConfig
from dskd.plan.method import MethodCost, method_cost
from dskd.plan.shape import ModelShape, read_shape
from dskd.plan.workload import Workload, workload_of


@dataclass(frozen=True)
class Models:
    """Student, teacher, and what is done with them."""

    student: ModelShape
    teacher: ModelShape | None
    """None where the method learns from none."""
    method: MethodCost
    workload: Workload


def read_models(run: RunConfig) -> Models:
    """From the models' config.json and the first records alone. Raises `UserError`."""
    student = read_shape(run.student.path, "student.path")
    taught = run.teacher is not None and run.method.teacher != "none"
    teacher = read_shape(run.teacher.path, "teacher.path") if run.teacher is not None and taught else None
    return Models(student, teacher, method_cost(run.method, student, teacher), workload_of(run))
