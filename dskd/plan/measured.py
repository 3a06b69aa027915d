"""What some real steps of a run took, beside what was predicted for them."""

from dataclasses import dataclass, replace

from dskd.plan.forecast import Correction, Forecast
from dskd.plan.machine import Machine, these_gpus, this_machine
from dskd.plan.memory import activations, highest, process
from dskd.plan.time import steps_seconds
from dskd.plan.workload import Workload

LEAST = 0.2
"""Of the activations predicted, that measuring can leave of them."""


@dataclass(frozen=True)
class Measured:
    """Steps on the longest records, on the ranks of this machine."""

    peak: int
    """Bytes at the highest moment: on a GPU of tensors, on a CPU of the process above what it had before it began."""
    seconds: float
    """Of a step."""
    longest: int
    """Tokens of the longest record."""
    padded_tokens: int
    """Of a step, on all ranks."""
    response_tokens: int
    longest_responses: int
    """Most response tokens of a micro-batch."""
    ranks: int
    gpu_memory: int | None
    """Bytes of a GPU; None on CPUs."""

    @property
    def machine(self) -> Machine:
        return this_machine(self.ranks) if self.gpu_memory is None else these_gpus(self.ranks, self.gpu_memory)

    @property
    def workload(self) -> Workload:
        """One such step as a run of its own."""
        return Workload(
            records=1,
            steps=1,
            epochs=1,
            padded_tokens=self.padded_tokens,
            response_tokens=self.response_tokens,
            longest=self.longest,
            longest_responses=self.longest_responses,
            known=True,
        )


def correct(forecast: Forecast, found: Measured) -> tuple[str, Correction]:
    """A line that compares, and the correction that follows.

    What memory differs by is taken for activations, the one part that is no exact count of something.
    """
    same = replace(forecast, machine=found.machine, models=replace(forecast.models, workload=found.workload))
    tensors = highest(same.step)
    predicted = tensors.total + (process(same.step) if found.gpu_memory is None else 0)
    checkpointing = same.run.engine.gradient_checkpointing
    seconds = steps_seconds(same.models, same.machine, same.backend, checkpointing, same.step.size)
    line = (
        f"measured: {found.peak / 1e9:.2f} GB a rank at the highest, predicted {predicted / 1e9:.2f} "
        f"({predicted / found.peak:.2f}); {found.seconds:.2f} s a step, predicted {seconds:.2f}"
    )
    share = 1.0
    if tensors.activations:
        share = max(LEAST, 1 + (found.peak - predicted) / activations(same.step))
    return line, Correction(activations=share, hours=found.seconds / seconds)
