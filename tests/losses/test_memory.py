"""Memory that a loss takes on a GPU in bf16, counted without one, on tensors without data in `make bench-gpu`'s sizes.

The Triton kernels allocate nothing themselves, so they are left out; all else runs as it does on a GPU.
"""

from dataclasses import replace

import pytest
import torch
from bench.gpu import HEADS, SAMPLE
from bench.loss_heads import Sizes
from support.heads import Weights, means
from torch.fx.experimental import _config
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dskd.config.engine import EngineConfig
from dskd.config.methods import MethodConfig
from dskd.losses import METHODS, kernels
from dskd.losses.kernels import fused
from dskd.losses.tensors import MethodContext, Tokens
from dskd.plan.activations import Batch
from dskd.plan.memory import Step, attention, loss_passes
from dskd.plan.method import method_cost
from dskd.plan.shape import ModelShape


class Peak(TorchDispatchMode):
    """The most bytes in use at a time of what operations have made."""

    def __init__(self):
        super().__init__()
        self.there, self.most = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.see((args, kwargs), counts=False)
        made = func(*args, **(kwargs or {}))
        self.see(made, counts=True)
        self.there = {key: each for key, each in self.there.items() if not each[0].expired()}
        self.most = max(self.most, sum(size for _, size in self.there.values()))
        return made

    def see(self, tensors, counts):
        for each in tree_leaves(tensors):
            if isinstance(each, torch.Tensor) and each.is_meta:
                storage = each.untyped_storage()
                self.there.setdefault(storage._cdata, (StorageWeakRef(storage), counts * storage.nbytes()))


@pytest.fixture
def no_data(monkeypatch):
    """The code of a GPU on tensors without data, which any other read of them than in `most` would miss."""
    monkeypatch.setattr(kernels, "FUSED", ("meta",))
    monkeypatch.setattr(kernels, "problem", lambda device: None)
    monkeypatch.setattr(fused, "launch", lambda *arguments, **options: None)


def most(kind, sizes, monkeypatch):
    """Forward and backward; the gradients of the weights stay.

    Nothing else is read of the tensors than what a method counts itself: that no token lacks a label, and 0 agree.
    """
    with torch.device("meta"), _config.patch(meta_nonzero_assume_all_nonzero=True):
        method, own, other = made(kind, sizes)
    if method.counts_itself:
        monkeypatch.setattr(torch.Tensor, "tolist", lambda counts: [0] * len(counts))
    with Peak() as peak:
        method(own, other, means(method)).loss.backward()
    return peak.most


def made(kind, sizes):
    student, teacher = (
        Weights(*torch.empty(2, *each, dtype=torch.bfloat16)) for each in (sizes.student, sizes.teacher)
    )
    student.weight.requires_grad_()
    labels = torch.empty(sum(sizes.lengths), dtype=torch.int64)
    own, other = (
        Tokens(torch.empty(len(labels), each.hidden_size, dtype=torch.bfloat16), labels, labels, sizes.lengths)
        for each in (student, teacher)
    )
    own.hidden.requires_grad_()
    student_ids = None
    if kind in ("mined", "dskd_v2_eta"):
        where = {"device": "cpu"} if kind == "mined" else {}  # the host reads its tables, once
        student_ids = torch.arange(teacher.vocab_size, **where).clamp_max(student.vocab_size - 1)
        other = other._replace(pairs=torch.arange(len(labels)).repeat(2, 1).T)
    context = MethodContext(student, teacher, EngineConfig().loss_memory_mb, student_ids)
    return METHODS[kind](MethodConfig.kinds[kind](), context).to(torch.bfloat16), own, other


@pytest.mark.parametrize("name", HEADS)
def test_a_loss_takes_at_most_a_gib_and_what_is_planned_for_it(name, no_data, monkeypatch):
    kind, student, teacher, tokens = HEADS[name]
    found = most(kind, Sizes(student, teacher, (SAMPLE,) * (tokens // SAMPLE)), monkeypatch)
    (_, d), (_, wide) = student, teacher
    foreseen = step(kind, student, teacher, tokens)
    assert found <= 2**30
    planned, states = max(loss_passes(foreseen)), 2 * tokens * (2 * d + 3 * wide)
    assert planned < found < planned + states + foreseen.method.kept


def test_attention_over_long_records_is_foreseen(no_data, monkeypatch):
    kind, student, teacher, tokens = HEADS["dskd_cma, wide"]
    found = most(kind, Sizes(student, teacher, (2048,) * (tokens // 2048)), monkeypatch)
    foreseen = step(kind, student, teacher, tokens, 2048)
    states = 2 * tokens * (2 * student[1] + 3 * teacher[1])
    assert max(loss_passes(foreseen)) + states < found < attention(foreseen).total + states


def step(kind, student, teacher, tokens, longest=SAMPLE):
    one = ModelShape(1, 1, 1, 1, 1, 1, 1, 0, True, True, True, False, 0)
    own, other = (replace(one, vocabulary=v, hidden=d, weights=v * d) for v, d in (student, teacher))
    cost, batch = (
        method_cost(MethodConfig.kinds[kind](), own, None if kind == "sft" else other),
        Batch(tokens // longest, longest),
    )
    return Step(own, own.weights, other, cost, EngineConfig(), "resident", 1, 1, batch, tokens, on_gpu=True)
