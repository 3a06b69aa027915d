"""Forward and backward of one method's loss head, both heads included: `python -m bench.loss_heads METHOD FORM`.

A micro-batch of 4 x 512 positions with 510 response tokens. FORM `streamed` is dskd's; `dense` makes full logits of all
positions of the padded batch, as the original does. The floor is the time of the matrix products with the heads alone,
over response tokens.
"""

import json
import sys
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
from support.dense import dense_loss
from support.heads import Weights, means

from bench.measure import measured, one_thread, seconds
from dskd.config.engine import EngineConfig
from dskd.config.methods import MethodConfig
from dskd.losses import METHODS
from dskd.losses.method import Method
from dskd.losses.tensors import MethodContext, Tokens

SAMPLES, LENGTH, RESPONSE = 4, 512, (127, 128, 128, 127)
SPREAD = 0.02  # of the weights, as models are initialised
REPEATS = 3

# Products with a head over all response tokens: forward, gradient of the hidden states, gradient of the head.
LOGITS = {"student": (1, 1, 1), "teacher": (1, 0, 0)}
DUAL_SPACE = {"student": (2, 2, 1), "teacher": (2, 1, 0)}
PRODUCTS = {"sft": {"student": (1, 1, 1)}, "kd": LOGITS, "uld": LOGITS, "mined": LOGITS}


@dataclass(frozen=True)
class Sizes:
    """Weights [V, D] of both heads, and the response tokens of each sample."""

    student: tuple[int, int]
    teacher: tuple[int, int]
    lengths: tuple[int, ...]


ONE_VOCABULARY = Sizes((50257, 768), (50257, 1600), RESPONSE)
TWO_VOCABULARIES = Sizes((50257, 768), (151936, 2048), RESPONSE)


def sizes_for(kind: str) -> Sizes:
    return ONE_VOCABULARY if MethodConfig.kinds[kind].teacher == "same_vocabulary" else TWO_VOCABULARIES


def make(
    kind: str, sizes: Sizes, memory_mb: int = EngineConfig().loss_memory_mb, dtype: torch.dtype = torch.float32
) -> tuple[Method, Weights, Weights, Tokens, Tokens]:
    """On torch's default device. Both heads agree where they can: a mask over predictions leaves all tokens in."""
    config = MethodConfig.kinds[kind]
    (vocabulary, d), (teacher_vocabulary, wide) = sizes.student, sizes.teacher
    embeddings, head = (SPREAD * torch.randn(sizes.student, dtype=dtype) for _ in range(2))
    student = Weights(embeddings, head.requires_grad_())
    weight = SPREAD * torch.randn(teacher_vocabulary, wide, dtype=dtype)
    shared = min(vocabulary, teacher_vocabulary)
    weight[:shared, :d] = student.weight.detach()[:shared]
    teacher = Weights(weight, weight)
    labels, inputs = torch.randint(shared, (2, sum(sizes.lengths)))
    hidden = 50 * student.weight.detach()[labels] + torch.randn(len(labels), d, dtype=dtype)
    teacher_hidden = 50 * weight[labels] + torch.randn(len(labels), wide, dtype=dtype)
    own = Tokens(hidden.requires_grad_(), inputs, labels, sizes.lengths)
    other = Tokens(teacher_hidden, inputs, labels, sizes.lengths)
    student_ids = None
    if config.alignment != "none":
        student_ids = torch.arange(teacher_vocabulary)
        student_ids[vocabulary:] = -1  # none where the student's is the wider one
        other = other._replace(pairs=torch.arange(len(labels)).repeat(2, 1).T)
    method = METHODS[kind](config(), MethodContext(student, teacher, memory_mb, student_ids)).to(dtype)
    return method, student, teacher, own, other


def padded(tokens: Tokens) -> Tokens:
    """The same with all positions of the padded batch."""
    more = SAMPLES * LENGTH - len(tokens.labels)
    fill = torch.randint(len(tokens.labels), (more,))
    hidden = torch.cat([tokens.hidden, tokens.hidden[fill]]).detach().requires_grad_(tokens.hidden.requires_grad)
    labels, inputs = (torch.cat([ids, ids[fill]]) for ids in (tokens.labels, tokens.inputs))
    pairs = None if tokens.pairs is None else torch.arange(len(labels)).repeat(2, 1).T
    return Tokens(hidden, inputs, labels, (LENGTH,) * SAMPLES, pairs)


def streamed_step(method: Method, own: Tokens, other: Tokens) -> None:
    method.start_step()
    method(own, other, means(method)).loss.backward()


def dense_step(method: Method, student: Weights, teacher: Weights, own: Tokens, other: Tokens) -> None:
    parts = dense_loss(method, student, teacher, own, other)
    sum(method.weights[name] * value / max(tokens, 1) for name, (value, tokens) in parts.items()).backward()


def floor_seconds(kind: str, method: Method, student: Weights, teacher: Weights, own: Tokens, other: Tokens) -> float:
    """Each distinct product timed on half of the tokens, times how often it is needed."""
    total = 0.0
    for side, model, tokens in (("student", student, own), ("teacher", teacher, other)):
        counts = PRODUCTS.get(kind, DUAL_SPACE).get(side, (0, 0, 0))
        weight, hidden = model.weight.detach(), tokens.hidden.detach()[: len(tokens.labels) // 2]
        logits = torch.mm(hidden, weight.T)
        head = torch.zeros_like(weight) if counts[2] else None
        for count, product in zip(
            counts,
            (
                partial(torch.mm, hidden, weight.T, out=logits),
                partial(torch.mm, logits, weight),
                lambda head=head, logits=logits, hidden=hidden: head.addmm_(logits.T, hidden),
            ),
            strict=True,
        ):
            total += 2 * count * seconds(product) if count else 0.0
    if kind.startswith("dskd_v2"):  # s2t from both heads, once a step
        rows = min(len(student.weight), len(teacher.weight))
        total += seconds(partial(torch.mm, student.weight.detach()[:rows].T, teacher.weight.detach()[:rows]))
    return total


def main(kind: str, form: str) -> None:
    one_thread()
    method, student, teacher, own, other = make(kind, sizes_for(kind))
    if form == "dense":
        own, other = padded(own), padded(other)
        print(json.dumps(measured(partial(dense_step, method, student, teacher, own, other))))
        return
    few = [
        Tokens(t.hidden[:8].detach().requires_grad_(t.hidden.requires_grad), t.inputs[:8], t.labels[:8], (8, 0, 0, 0))
        for t in (own, other)
    ]
    streamed_step(method, few[0], few[1]._replace(pairs=None if other.pairs is None else other.pairs[:8]))
    student.weight.grad = None
    steps, floors = [], []
    for _ in range(REPEATS):  # in turns: other work on the machine then slows down both
        floors.append(floor_seconds(kind, method, student, teacher, own, other))
        steps.append(measured(partial(streamed_step, method, own, other)))
        student.weight.grad = own.hidden.grad = None
    found = {name: median(step[name] for step in steps) for name in steps[0]}
    print(json.dumps(found | {"floor_seconds": median(floors)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
