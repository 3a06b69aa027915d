"""What every method does with the response: cross-entropy of the student's tokens, beside whatever it distils."""

import torch
from torch import Tensor

from dskd.losses.distances import Distance
from dskd.losses.kernels import Found, Scales, Terms, kernels_for
from dskd.losses.streaming import StreamedLogits, stream
from dskd.losses.tensors import Head, Sum, Tokens


class Response:
    """The student's response tokens, to be streamed, and the sums over them.

    Args:
        first: [M], the tokens to come before the others, in this order: what is distilled from the teacher goes over
            the first M, and the others cost nothing but their cross-entropy. None: all, in their order.
        memory_mb: of vocabulary-sized temporaries.

    Attributes:
        labels: [N] in that order.
        ce, correct: scalars, summed over the blocks that `count_in` has seen.
    """

    def __init__(
        self, student: Tokens, head: Head, smoothing: float, memory_mb: int, first: Tensor | None = None
    ) -> None:
        hidden, self.labels, self.smoothing = student.hidden, student.labels, smoothing
        self.count, self.memory_mb = len(student.labels), memory_mb
        if first is not None:
            # Sorted and not searched for: a GPU's host would wait for how many there are.
            is_first = torch.zeros(self.count, dtype=torch.int8, device=first.device).index_fill_(0, first, 1)
            others = is_first.argsort(stable=True)[: self.count - len(first)]
            order = torch.cat([first, others])
            hidden, self.labels = hidden[order], self.labels[order]
        self.streamed = StreamedLogits(hidden, head, head_memory_mb=memory_mb)
        self.ce, self.correct = torch.zeros(2, device=self.labels.device)

    def terms(self, rows: slice, distance: Distance | None = None) -> Terms:
        """What is wanted of a block of the first tokens, or of the others."""
        return Terms(self.labels[rows], smoothing=self.smoothing, distance=distance)

    def count_in(self, found: Found) -> None:
        self.correct += found.correct.sum()
        self.ce += found.ce.sum()

    def learn_alone(self, tokens: range, scale: float) -> None:
        """Take `tokens` with nothing but their cross-entropy, whose gradient is multiplied with `scale`."""
        kernels = kernels_for(self.streamed.weight)
        for rows, (own,) in stream(tokens, self.memory_mb, kernels, self.streamed):
            found = kernels.measure(own, None, self.terms(rows))
            self.count_in(found)
            found.write(Scales(scale))

    @property
    def part(self) -> Sum:
        return Sum(self.ce, self.count)

    @property
    def accuracy(self) -> Sum:
        return Sum(self.correct, self.count)


def alignment_metrics(pairs: Tensor, student: Tokens) -> dict[str, Sum]:
    """The share of the student's tokens that are aligned, and of its samples without any that is."""
    ends = torch.tensor(student.lengths).cumsum(0).to(pairs.device, non_blocking=True)
    count, samples = len(student.labels), len(student.lengths)
    missed = torch.ones(samples, device=pairs.device)
    missed.index_fill_(0, torch.bucketize(pairs[:, 1].contiguous(), ends, right=True), 0)
    return {
        "aligned_tokens": Sum(torch.full((), float(len(pairs)), device=pairs.device), count),
        "samples_without_alignment": Sum(missed.sum(), samples),
    }
