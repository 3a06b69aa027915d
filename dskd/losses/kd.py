"""Vanilla distillation: the distance between both models' distributions over one shared vocabulary."""

from dskd.config.methods import KdConfig
from dskd.losses.distances import Tempered, distance
from dskd.losses.logit_method import LogitMethod
from dskd.losses.tensors import MethodContext, Tokens


class Kd(LogitMethod[KdConfig]):
    """Distillation of logits (arXiv 2406.17328, equation 2).

    Where one head is padded wider than the other, the distance is taken over the columns that both have; the
    cross-entropy is over the student's whole head.
    """

    def __init__(self, settings: KdConfig, context: MethodContext) -> None:
        super().__init__(settings, context)
        self.divergence = distance(settings)

    def aligned(self, student: Tokens, teacher: Tokens) -> None:
        return None

    @property
    def distance(self) -> Tempered:
        return self.divergence
