"""Logit alignment by minimum edit distance, of sequences and of vocabularies (MinED, of FuseLLM, arXiv 2401.10491).

The sequences are aligned by a time-warping path over the edit distances of their tokens. Where it pairs one token with
one, the teacher's distribution is carried into the student's vocabulary; elsewhere the response token itself is the
target.
"""

import torch
from torch import Tensor

from dskd.config.methods import MinedConfig
from dskd.losses.cross_entropy import cross_entropy
from dskd.losses.divergence import distance, log_of_mixture
from dskd.losses.logit_method import LogitMethod
from dskd.losses.tensors import MethodContext, Tokens


class Mined(LogitMethod[MinedConfig]):
    """Each student token has the probability of all teacher tokens that are nearest to it in spelling.

    The distance is over the student tokens that any teacher token maps to; what the teacher gives to tokens that map
    nowhere is left out.
    """

    targets: Tensor  # [C] the student tokens that any teacher token maps to
    sources: Tensor  # [S] the teacher tokens that map anywhere, those of one target side by side
    runs: Tensor  # [C] how many there are for each target

    def __init__(self, settings: MinedConfig, context: MethodContext) -> None:
        super().__init__(settings, context)
        student_ids = context.student_ids
        if student_ids is None:  # one vocabulary
            student_ids = torch.arange(min(self.student.vocab_size, self.teacher.vocab_size))
        self.temperature = settings.temperature
        self.teacher_temperature = settings.temperature * settings.teacher_temperature
        self.divergence = distance(settings)
        sources = (student_ids >= 0).nonzero().squeeze(-1)
        runs = torch.bincount(student_ids[sources])
        by_target = student_ids[sources].argsort(stable=True)
        self.register_buffer("targets", runs.nonzero().squeeze(-1), persistent=False)
        self.register_buffer("sources", sources[by_target], persistent=False)
        self.register_buffer("runs", runs[runs > 0], persistent=False)

    def aligned(self, student: Tokens, teacher: Tokens) -> Tensor | None:
        """The one-to-one pairs of the path."""
        if teacher.pairs is None:
            return None
        alone = [(side.bincount() == 1)[side] for side in teacher.pairs.unbind(-1)]
        return teacher.pairs[alone[0] & alone[1]]

    def distance(self, logits: Tensor, teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
        probs = teacher_logits.div(self.teacher_temperature).softmax(-1)
        summed = torch.segment_reduce(probs[:, self.sources].T.contiguous(), "sum", lengths=self.runs, axis=0).T
        # The distance divides by the temperatures once more.
        teacher = log_of_mixture(summed).mul_(self.teacher_temperature)
        value, grad = self.divergence(logits[:, self.targets], teacher)
        return value, torch.zeros_like(logits).index_copy_(-1, self.targets, grad)

    def distance_from_label(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        value, grad = cross_entropy(logits / self.temperature, labels)
        return value, grad.div_(self.temperature)
