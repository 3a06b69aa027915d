"""The teacher in pieces gives the hidden states, ends and losses of the resident one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.two_steps import two_steps
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from dskd.config.errors import UserError
from dskd.config.load import load_run
from dskd.config.models import TeacherConfig
from dskd.data.batch import Batch, collate
from dskd.data.tokenization import Sample
from dskd.engine.distributed import Ranks
from dskd.launch.ranks import free_port, rank_environment
from dskd.models.load import load_tokenizer
from dskd.models.views import try_packing
from dskd.teachers import sharded
from dskd.teachers.resident import load_resident
from dskd.teachers.sharded import grouped, load_sharded

WORKER = Path(__file__).parents[1] / "support" / "two_steps.py"
FAMILIES = ["gpt2", "llama", "gemma2"]
METHODS = ["kd", "dskd_cma", "uld", "dskd_v2"]


def micro_batches(packed=False):
    """Of several sizes, one with a response that nothing predicts."""
    rng = np.random.default_rng(0)
    sizes = [[(3, 6), (0, 4)], [(7, 1)], [(1, 12), (9, 9), (2, 2)], [(0, 1)]]
    samples = [[Sample(rng.integers(0, 300, p), rng.integers(0, 300, r)) for p, r in micro] for micro in sizes]
    sides = [collate(micro, packed=packed) for micro in samples]
    return [Batch((), side, side) for side in sides]


@pytest.fixture
def batches():
    return micro_batches()


def both(path, ranks, **settings):
    tokenizer = load_tokenizer(path, "teacher.path")
    whole = load_resident(TeacherConfig(path, settings.get("adapter")), tokenizer, "fp32", ranks.device)
    return whole, load_sharded(TeacherConfig(path, backend="sharded", **settings), tokenizer, "fp32", ranks)


def assert_same(whole, pieces, batches):
    expected, found = list(whole.states(batches)), list(pieces.states(batches))
    assert [len(states) for states in found] == [len(batch.teacher.labels) for batch in batches]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert (pieces.ends.hidden_size, pieces.ends.vocab_size) == (whole.ends.hidden_size, whole.ends.vocab_size)
    mine, theirs = pieces.ends.head(), whole.ends.head()
    assert torch.equal(mine.weight, theirs.weight)
    assert (mine.scale, mine.softcap) == (theirs.scale, theirs.softcap)
    for batch in batches:
        for ids in (batch.teacher.labels, batch.teacher.inputs):
            assert torch.equal(pieces.ends.embed(ids), whole.ends.embed(ids))


@pytest.mark.parametrize("most_tokens", [1, 60, 2**14])
@pytest.mark.parametrize("family", FAMILIES)
def test_states_and_ends_are_the_resident_teacher_s(family, most_tokens, tiny, ranks, batches, monkeypatch):
    monkeypatch.setattr(sharded, "MOST_TOKENS", most_tokens)
    whole, pieces = both(tiny(family), ranks)
    for step in (batches, batches[2:], batches[:1]):
        assert_same(whole, pieces, step)


@pytest.mark.parametrize("most_tokens", [1, 30, 2**14])
def test_states_of_packed_micro_batches_are_those_of_padded_ones(most_tokens, tiny, ranks, batches, monkeypatch):
    monkeypatch.setattr(sharded, "MOST_TOKENS", most_tokens)
    whole, pieces = both(tiny("llama"), ranks)
    assert try_packing(pieces.view, 20) is None
    for one, other in zip(pieces.states(micro_batches(packed=True)), whole.states(batches), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_only_the_head_is_whole_and_nothing_takes_a_gradient(tiny, ranks, batches):
    _, pieces = both(tiny("llama"), ranks)
    list(pieces.states(batches))
    parameters = dict(pieces.view.causal.named_parameters())
    assert [name for name, p in parameters.items() if not isinstance(p, DTensor)] == ["lm_head.weight"]
    assert not any(p.requires_grad for p in parameters.values())


def test_an_adapter_is_in_it(tiny, ranks, batches, tmp_path):
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(tiny("llama"))
    config = LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False)
    get_peft_model(base, config).save_pretrained(tmp_path)
    assert_same(*both(tiny("llama"), ranks, adapter=tmp_path), batches)


def test_a_rank_with_less_to_do_takes_part_in_every_forward(tiny, ranks, batches, monkeypatch):
    monkeypatch.setattr(sharded, "MOST_TOKENS", 60)
    whole, pieces = both(tiny("llama"), ranks)
    runs = []
    pieces.view.body.module.register_forward_hook(lambda *_: runs.append(1))
    assert len(grouped([batch.teacher for batch in batches], 60)) == 3
    monkeypatch.setattr(Ranks, "gather", lambda self, value: [value, 5])
    assert_same(whole, pieces, batches)
    assert len(runs) == 5


def test_micro_batches_run_together_up_to_a_number_of_tokens(batches):
    sides = [batch.teacher for batch in batches]
    shapes = [tuple(side.input_ids.shape) for side in sides]
    assert shapes == [(2, 9), (1, 8), (3, 18), (1, 1)]
    for most, expected in ((1, [1, 1, 1, 1]), (26, [1, 1, 1, 1]), (27, [2, 1, 1]), (72, [2, 2]), (126, [4])):
        groups = grouped(sides, most)
        assert [len(group) for group in groups] == expected
        assert [side for group in groups for side in group] == sides


def test_a_model_that_does_not_fit_is_told(tiny, ranks):
    tokenizer = load_tokenizer(tiny("llama"), "teacher.path")
    with pytest.raises(UserError, match=r"^teacher\.path: its tokenizer has ids up to"):
        load_sharded(TeacherConfig(tiny("llama", vocab_size=100), backend="sharded"), tokenizer, "fp32", ranks)


def test_settings_of_another_backend_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"^shard_group: node needs backend sharded, or cache"):
        TeacherConfig(tmp_path, shard_group="node")
    with pytest.raises(UserError, match=r"^offload: cpu needs backend sharded, or cache"):
        TeacherConfig(tmp_path, offload="cpu")


@pytest.mark.parametrize(
    ("places", "nodes"),
    [([0], [[0]]), ([0, 1, 2], [[0, 1, 2]]), ([0, 1, 0, 1], [[0, 1], [2, 3]]), ([0, 0, 1, 2], [[0], [1, 2, 3]])],
)
def test_the_ranks_of_each_node(places, nodes, monkeypatch):
    monkeypatch.setattr(Ranks, "gather", lambda self, value: places)
    found = Ranks(0, len(places), torch.device("cpu")).nodes()
    assert [list(node) for node in found] == nodes


@pytest.mark.parametrize("places", [[0, 0, 1, 1], [1, 0], [0, 2]])
def test_ranks_of_a_node_that_do_not_follow_each_other_are_refused(places, monkeypatch):
    monkeypatch.setattr(Ranks, "gather", lambda self, value: places)
    with pytest.raises(UserError, match=r"^LOCAL_RANK: "):
        Ranks(0, len(places), torch.device("cpu")).nodes()


@pytest.fixture(scope="module")
def two_ranks(make_run, tmp_path_factory):
    """A folder in which two ranks with a student under ZeRO-3 have run every method."""
    root = tmp_path_factory.mktemp("two")
    for kind in METHODS:
        folder = root / "steps" / kind
        folder.mkdir(parents=True)
        engine = {"zero_stage": 3, "persistence_threshold": 0}
        make_run(folder, method={"kind": kind}, teacher={"backend": "sharded"}, engine=engine)
    port, command = free_port(), [sys.executable, str(WORKER), str(root)]
    started = [subprocess.Popen(command, env=os.environ | rank_environment(rank, 2, port)) for rank in range(2)]
    assert [rank.wait(300) for rank in started] == [0, 0]
    return root / "steps"


@pytest.mark.parametrize("kind", METHODS)
def test_losses_beside_a_student_under_zero_3_are_the_resident_teacher_s(kind, two_ranks, make_run, tmp_path, ranks):
    alone = make_run(tmp_path, method={"kind": kind})
    assert load_run(alone).teacher.backend == "resident"
    two_steps(alone, ranks)
    for step in (1, 2):
        expected = json.loads((tmp_path / f"figures{step}.rank0").read_text())
        for rank in range(2):
            found = json.loads((two_ranks / kind / f"figures{step}.rank{rank}").read_text())
            figures = [name for name in expected if not name.endswith(("seconds", "per_second"))]
            assert found["loss"] == pytest.approx(expected["loss"], rel=1e-4)
            assert [found[name] for name in figures] == pytest.approx([expected[name] for name in figures], rel=2e-3)
