"""The random generators go on where they were."""

import json
import random

import numpy as np
import pytest
import torch

from dskd.checkpoint import randomness

DRAWS = {"python": random.random, "numpy": np.random.rand, "torch": lambda: float(torch.rand(()))}


@pytest.fixture(autouse=True)
def as_before():
    """Other tests find the generators as they were."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    random.setstate(before[0])
    np.random.set_state(before[1])
    torch.set_rng_state(before[2])


@pytest.mark.parametrize("name", DRAWS)
def test_each_generator_draws_again_what_it_drew_after_it_was_captured(name):
    draw, device = DRAWS[name], torch.device("cpu")
    random.gauss(0, 1)  # which keeps a second number for the next call
    tensors, values = randomness.capture(device)
    expected = [draw() for _ in range(3)]
    assert [draw() for _ in range(3)] != expected
    randomness.restore(tensors, json.loads(json.dumps(values)), device)
    assert [draw() for _ in range(3)] == expected


@pytest.mark.parametrize("name", DRAWS)
def test_a_seed_says_what_each_generator_draws(name):
    drawn = []
    for number in (5, 5, 6):
        randomness.seed(number)
        drawn.append(DRAWS[name]())
    assert drawn[0] == drawn[1] != drawn[2]
