"""What every method is: a module that holds its projectors and turns response tokens into a loss."""

from collections.abc import Callable, Mapping, Sequence
from typing import Generic, TypeVar

from torch import Tensor, nn

from dskd.config.methods import MethodConfig
from dskd.losses.streaming import attach_gradients
from dskd.losses.tensors import LossOutput, MethodContext, Model, ScaleParts, Sum, Tokens

S = TypeVar("S", bound=MethodConfig)


class Method(nn.Module, Generic[S]):
    """Base of all methods, over the type of their settings.

    Built from its frozen settings and its context; anything registered as a submodule (projectors) is trained with
    `train.projector_lr` and saved with the run.

    Attributes:
        weights: the parts of the loss and what each is weighed by.
        counts_itself: whether its parts are over other tokens than all of the response; then `count_ahead` exists.
        looks_ahead: whether there is more that it can take over the global batch; then `look_ahead` exists.
    """

    weights: dict[str, float]
    counts_itself = False
    looks_ahead = False

    def __init__(self, settings: S, context: MethodContext) -> None:
        super().__init__()
        self.settings = settings
        # In a tuple, so that torch does not take the models for submodules of the method.
        self._models = (context.student, context.teacher)
        self.memory_mb = context.memory_mb

    @property
    def student(self) -> Model:
        return self._models[0]

    @property
    def teacher(self) -> Model:
        teacher = self._models[1]
        assert teacher is not None
        return teacher

    def forward(self, student: Tokens, teacher: Tokens | None, scale_parts: ScaleParts) -> LossOutput:
        """The loss of one micro-batch.

        Args:
            student, teacher: the response tokens of each side.
            scale_parts: needed here, and collective, since gradients are computed in the forward pass.
        """
        raise AssertionError(f"{type(self).__name__} has no forward")

    def start_step(self) -> None:
        """Called before the first forward of a step: the weights have changed."""

    def count_ahead(self, teacher: Tokens) -> dict[str, int]:
        """Tokens of this micro-batch that each part is over; parts left out are over all of the response.

        Called before the first forward of a step of several micro-batches: a gradient needs the global batch's count.
        """
        return {}

    def look_ahead(self, teachers: Sequence[Tokens], over_ranks: Callable[[Tensor], Tensor]) -> None:
        """Take from the micro-batches of this rank what has to be over the global batch, and add it up over the ranks.

        Called after `start_step` where micro-batches depend on the number of ranks. A collective call.
        """


def finish(
    parts: Mapping[str, Sum],
    scales: Mapping[str, float],
    gradients: Sequence[tuple[Tensor, Tensor]],
    metrics: Mapping[str, Sum],
) -> LossOutput:
    """The loss, each part times its scale, as a function of the tensors whose gradients are known."""
    loss = sum(scales[name] * part.value for name, part in parts.items())
    assert isinstance(loss, Tensor)
    return LossOutput(attach_gradients(loss, gradients), dict(parts), dict(metrics))
