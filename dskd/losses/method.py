"""What every method is: a module that holds its projectors and turns response tokens into a loss."""

from typing import Any

from torch import Tensor, nn

from dskd.losses.tensors import LossOutput, Model, Tokens


class Method(nn.Module):
    """Base of all methods.

    Built from its frozen settings and access to both models; anything registered as a submodule (projectors) is trained
    with `train.projector_lr` and saved with the run.

    Attributes:
        weights: the parts of the loss and what each is weighed by.
    """

    weights: dict[str, float]

    def __init__(self, settings: Any, student: Model, teacher: Model | None, memory_mb: int) -> None:
        super().__init__()
        self.settings = settings
        # In a tuple, so that torch does not take the models for submodules of the method.
        self._models = (student, teacher)
        self.memory_mb = memory_mb

    @property
    def student(self) -> Model:
        return self._models[0]

    @property
    def teacher(self) -> Model:
        teacher = self._models[1]
        assert teacher is not None
        return teacher

    def forward(self, student: Tokens, teacher: Tokens | None, scales: dict[str, float]) -> LossOutput:
        """The loss of one micro-batch.

        Args:
            student, teacher: the response tokens of each side.
            scales: what to multiply the sum of each part with, its weight and the division by the number of tokens of
                the global batch included. It is needed here since gradients are computed in the forward pass.
        """
        raise AssertionError(f"{type(self).__name__} has no forward")

    def scaled(self, parts: dict[str, Tensor], scales: dict[str, float]) -> Tensor:
        """The loss: each part times its scale."""
        total = sum(scales[name] * value for name, value in parts.items())
        assert isinstance(total, Tensor)
        return total
