"""What ranks decide together: one that wants something is enough, and one that fails is heard by all."""

from dataclasses import replace
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from dskd.config.errors import UserError
from dskd.config.training import TrainConfig
from dskd.engine import distributed
from dskd.engine.distributed import Ranks
from dskd.engine.preemption import Decision, Flags, Stopped
from dskd.start import longest

WISHES = ("stop", "save")


def alone(*wishes):
    """A rank without others that wants these things, and what its ranks decide."""
    ranks = Ranks(0, 1, torch.device("cpu"), Flags(stop_requested="stop" in wishes))
    return ranks, ranks.agree("save" in wishes)


@pytest.fixture
def other(monkeypatch):
    """`other(values)`: from now on a second rank adds these in each sum."""
    return lambda values: monkeypatch.setattr(dist, "all_reduce", lambda own: own.add_(torch.tensor(values)))


def test_nothing_is_decided_that_no_rank_wants():
    assert alone()[1] == Decision(False, False)


@pytest.mark.parametrize("wish", WISHES)
def test_what_a_rank_wants_is_decided(wish):
    ranks, decision = alone(wish)
    assert decision == replace(Decision(False, False), **{wish: True})
    assert ranks.flags.moves == 1


@pytest.mark.parametrize("wish", WISHES)
def test_what_another_rank_wants_is_decided(wish, other):
    other([float(wish == name) for name in WISHES])
    ranks = Ranks(0, 2, torch.device("cpu"))
    assert ranks.agree() == replace(Decision(False, False), **{wish: True})


def test_a_stop_that_another_rank_was_asked_for_stops_this_one(other):
    ranks = Ranks(0, 2, torch.device("cpu"))
    other([0.0, 1.0])
    ranks.stop_if_asked()
    other([1.0, 0.0])
    with pytest.raises(Stopped):
        ranks.stop_if_asked()
    assert not ranks.flags.stop_requested


def test_a_sum_is_over_all_ranks(other):
    other(5)
    assert Ranks(0, 2, torch.device("cpu")).sum_int(3) == 8
    assert Ranks(0, 1, torch.device("cpu")).sum_int(3) == 3


def test_what_is_gathered_comes_back_as_json_brings_it(ranks):
    value = {"text": "Kraków 🐋", "numbers": (1, 2.5, None), "empty": []}
    assert ranks.gather(value) == [value | {"numbers": [1, 2.5, None]}]


def test_a_mistake_that_a_rank_finds_is_told_by_all(ranks):
    def fail():
        raise UserError("train.lr: no")

    with pytest.raises(UserError, match=r"^train\.lr: no$"):
        ranks.together(fail)
    assert ranks.together(lambda: 7) == [7]


def test_collectives_outlast_whatever_a_rank_may_be_busy_with(ranks):
    """Such as saving, with which one keeps the others waiting."""
    group = dist.group.WORLD._get_backend(torch.device("cpu"))
    assert group.options._timeout == ranks.timeout == timedelta(minutes=2 * TrainConfig().save_minutes)
    assert longest(TrainConfig(save_minutes=300.0)) == 300.0


def test_a_rank_without_a_gpu_of_its_own_is_told(monkeypatch):
    for name, value in {"RANK": "2", "WORLD_SIZE": "3", "LOCAL_RANK": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(distributed, "visible_gpus", lambda: 2)
    with pytest.raises(UserError, match=r"^launch.processes: 3 are more than the 2 GPUs of this machine"):
        distributed.start()
