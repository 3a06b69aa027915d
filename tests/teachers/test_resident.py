"""The resident teacher beside the student: one micro-batch ahead, and no more."""

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from dskd.data.batch import Batch, collate
from dskd.data.tokenization import Sample
from dskd.models.views import ModelView
from dskd.teachers.resident import ResidentTeacher


def test_it_is_one_micro_batch_ahead_of_who_asks_and_gives_the_same_states(tiny):
    """With the streams of a CPU, which are none: what runs beside what on a GPU follows from the order of calls."""
    rng = np.random.default_rng(0)
    sides = [collate([Sample(rng.integers(0, 90, 3), rng.integers(0, 90, n)) for n in (2, 5)]) for _ in range(3)]
    batches = [Batch((0, 1), side, side) for side in sides]
    teacher = ResidentTeacher(ModelView(AutoModelForCausalLM.from_pretrained(tiny("llama")).eval(), "teacher.path"))
    expected = list(teacher.states(batches))
    events, run = [], teacher.run

    def remember(batch):
        events.append(f"run {next(i for i, each in enumerate(batches) if each is batch)}")
        return run(batch)

    teacher.run, teacher.runs_ahead = remember, True
    found = []
    for index, states in enumerate(teacher.states(batches)):
        events.append(f"given {index}")
        found.append(states)
        assert torch.is_grad_enabled()
        assert not states.requires_grad
    assert events == ["run 0", "run 1", "given 0", "run 2", "given 1", "given 2"]
    for states, wanted in zip(found, expected, strict=True):
        assert states.equal(wanted)
