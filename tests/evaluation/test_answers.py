"""Answers and their scores: every record once, the same however the work is split."""

import json
import shutil
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from transformers import AutoModelForCausalLM, AutoTokenizer

from dskd.config.training import GenerationConfig
from dskd.data.records import Record, read_records
from dskd.engine.distributed import Ranks
from dskd.evaluation.answers import Answering, answer_all, mean_scores, rounds
from dskd.evaluation.scores import score
from dskd.models.load import load_checkpoint, load_tokenizer

SHORT = {"max_length": 40, "max_prompt_length": 30}
CPU = torch.device("cpu")
PROMPTS = ("Where is Lima?", "", "Question 1: Where is Paris and where is the old dog?\nAnswer:", "a")


@pytest.fixture(scope="module")
def model(tiny):
    folder = tiny("llama")
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def records(make_run, tmp_path):
    make_run(tmp_path)
    return read_records(tmp_path / "dev.jsonl")


@pytest.mark.parametrize(
    ("extra", "greedy"),
    [({"repetition_penalty": 3.0}, True), ({"num_beams": 3}, True), ({"min_p": 0.9, "do_sample": True}, False)],
)
def test_a_model_s_own_generation_settings_do_not_count(tiny, tmp_path, ranks, extra, greedy):
    folder = shutil.copytree(tiny("llama"), tmp_path / "model")
    file = folder / "generation_config.json"
    settings = GenerationConfig(greedy=greedy, **SHORT)
    records, tokenizer, answers = [Record(p, ("x",)) for p in PROMPTS], load_tokenizer(folder, "student"), []
    for own in ({}, extra):
        file.write_text(json.dumps(json.loads(file.read_text()) | own))
        answering = Answering(load_checkpoint(folder, "fp32", CPU), tokenizer, settings, ranks)
        answers.append(answer_all(answering, records, 1))
    assert answers[0] == answers[1]


def test_every_record_is_answered_once_in_order(model, records, ranks):
    settings = GenerationConfig(greedy=True, batch_size=4, **SHORT)
    found = answer_all(Answering(*model, settings, ranks), records, 7)
    assert [a.index for a in found] == list(range(len(records)))
    assert [(a.prompt, a.references) for a in found] == [(r.prompt, r.outputs) for r in records]
    assert {a.seed for a in found} == {7}
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    assert [(a.rougel, a.exact_match) for a in found] == [score(a.answer, a.references, scorer) for a in found]
    assert mean_scores(found) == (statistics.fmean(a.rougel for a in found), 0.0)


def test_a_training_model_stays_one(model, records, ranks):
    student, tokenizer = model
    student.train()
    answer_all(Answering(student, tokenizer, GenerationConfig(**SHORT), ranks), records[:1], 1)
    assert student.training
    student.eval()


@given(st.integers(1, 20), st.integers(1, 8))
def test_batches_are_dealt_once_in_equally_many_rounds(batches, world_size):
    dealt = [list(rounds([None] * batches, Ranks(rank, world_size, CPU))) for rank in range(world_size)]
    assert sorted(batch for part in dealt for own, batch in part if own) == list(range(batches))
    assert len({len(part) for part in dealt}) == 1
    assert all(0 <= batch < batches for part in dealt for _, batch in part)


def test_samples_follow_their_seed_alone(model, records, ranks):
    settings = GenerationConfig(batch_size=4, **SHORT)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first, again, other = (answer_all(Answering(*model, settings, ranks), records, seed) for seed in (1, 1, 2))
    assert [a.answer for a in first] == [a.answer for a in again]
    assert [a.answer for a in first] != [a.answer for a in other]
    assert torch.equal(torch.get_rng_state(), state)  # training goes on as if nothing had been sampled
