"""Logit alignment by minimum edit distance, of sequences and of vocabularies (MinED, of FuseLLM, arXiv 2401.10491).

The sequences are aligned by a time-warping path over the edit distances of their tokens. Where it pairs one token with
one, the teacher's distribution is carried into the student's vocabulary; elsewhere the response token itself is the
target.
"""

import torch
from torch import Tensor

from dskd.config.methods import MinedConfig
from dskd.losses.distances import Carried, ToLabel, distance
from dskd.losses.logit_method import LogitMethod
from dskd.losses.tensors import MethodContext, Tokens


class Mined(LogitMethod[MinedConfig]):
    """Each student token has the probability of all teacher tokens that are nearest to it in spelling.

    The distance is over the student tokens that any teacher token maps to; what the teacher gives to tokens that map
    nowhere is left out.
    """

    targets: Tensor
    sources: Tensor
    runs: Tensor

    def __init__(self, settings: MinedConfig, context: MethodContext) -> None:
        super().__init__(settings, context)
        student_ids = context.student_ids
        if student_ids is None:  # one vocabulary
            student_ids = torch.arange(min(self.student.vocab_size, self.teacher.vocab_size))
        self.divergence, self.distance_alone = distance(settings), ToLabel(settings.temperature)
        sources = (student_ids >= 0).nonzero().squeeze(-1)
        runs = torch.bincount(student_ids[sources])
        by_target = student_ids[sources].argsort(stable=True)
        self.register_buffer("targets", runs.nonzero().squeeze(-1), persistent=False)
        self.register_buffer("sources", sources[by_target], persistent=False)
        self.register_buffer("runs", runs[runs > 0], persistent=False)
        self.carried = Carried(self.divergence, self.targets, self.sources, self.runs)

    @property
    def distance(self) -> Carried:
        if self.carried.targets is not self.targets:  # the module was moved to a device
            self.carried = Carried(self.divergence, self.targets, self.sources, self.runs)
        return self.carried

    def aligned(self, student: Tokens, teacher: Tokens) -> Tensor | None:
        """The one-to-one pairs of the path, which are all that a micro-batch has."""
        return teacher.pairs
