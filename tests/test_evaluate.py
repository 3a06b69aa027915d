"""Answers and their scores: every record once, the same however the work is split."""

import json
import os
import shutil
import statistics
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from transformers import AutoModelForCausalLM, AutoTokenizer

from dskd.config.training import GenerationConfig
from dskd.data.records import Record, read_records
from dskd.data.tokenization import Limits, tokenize_prompt
from dskd.engine.distributed import Ranks
from dskd.evaluate import answer_all, mean_scores, normalize, rounds, score, summary
from dskd.launch.ranks import rank_environment
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


def test_the_best_of_several_references_counts():
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    # Longest common subsequence "the cat run" (stemmed) of 4 and 3 words: precision 3/4, recall 1.
    assert score("the big cat runs", ["dogs", "the cat running"], scorer) == (pytest.approx(100 * 6 / 7), 0.0)
    assert score("  The CAT! ", ["a dog", "the cat."], scorer) == (100.0, 100.0)
    assert score("", ["a"], scorer) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [(" It's  a\nTEST. ", "its a test"), ("(A-b)", "ab"), ("...", ""), ("Zürich, 東京", "zürich 東京")],
)
def test_normalized_text(text, expected):
    assert normalize(text) == expected


def test_mean_and_deviation_over_seeds():
    found = summary([(10.0, 0.0), (20.0, 50.0)])
    assert found["rougel"] == {"mean": 15.0, "deviation": pytest.approx(7.0710678), "by_seed": [10.0, 20.0]}
    assert found["exact_match"]["mean"] == 25.0
    assert summary([(10.0, 0.0)])["rougel"]["deviation"] == 0.0


def plain_greedy(model, tokenizer, prompt: str, settings: GenerationConfig) -> str:
    """The definition: the most probable token, one at a time, until EOS or max_length."""
    start = tokenize_prompt(tokenizer, prompt, Limits(settings.max_length, settings.max_prompt_length))
    ids = start = start or [tokenizer.eos_token_id]
    while len(ids) < settings.max_length and (ids is start or ids[-1] != tokenizer.eos_token_id):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits
        ids = [*ids, int(logits[0, -1].argmax())]
    return tokenizer.decode(ids[len(start) :], skip_special_tokens=True)


@pytest.fixture(scope="module", params=["gpt2", "gemma2"])
def greedy_answers(request, tiny, ranks):
    """Answers to PROMPTS by definition, and by answer_all in batches of 1 and of all."""
    model, tokenizer = load_checkpoint(tiny(request.param), "fp32", CPU), load_tokenizer(tiny(request.param), "student")
    found = {}
    for size in (1, len(PROMPTS)):
        settings = GenerationConfig(greedy=True, batch_size=size, **SHORT)
        answers = answer_all(model, tokenizer, [Record(p, ("x",)) for p in PROMPTS], settings, 1, ranks)
        found[size] = [answer.answer for answer in answers]
    return [plain_greedy(model, tokenizer, prompt, settings) for prompt in PROMPTS], found[1], found[len(PROMPTS)]


def test_greedy_answers_are_the_most_probable_tokens(greedy_answers):
    expected, alone, _ = greedy_answers
    assert alone == expected
    assert any(expected)


def test_left_padding_changes_no_token_of_a_greedy_answer(greedy_answers):
    expected, _, together = greedy_answers
    for whole, answer in zip(expected, together, strict=True):
        assert whole.startswith(answer)
        assert bool(answer) == bool(whole)


def test_greedy_answers_do_not_depend_on_the_batch(greedy_answers):
    expected, _, together = greedy_answers
    assert together == expected


@pytest.mark.parametrize(
    ("extra", "greedy"),
    [({"repetition_penalty": 3.0}, True), ({"num_beams": 3}, True), ({"min_p": 0.9, "do_sample": True}, False)],
)
def test_a_model_s_own_generation_settings_do_not_count(tiny, tmp_path, ranks, extra, greedy):
    folder = shutil.copytree(tiny("llama"), tmp_path / "model")
    file = folder / "generation_config.json"
    settings = GenerationConfig(greedy=greedy, batch_size=1, **SHORT)
    records, tokenizer, answers = [Record(p, ("x",)) for p in PROMPTS], load_tokenizer(folder, "student"), []
    for own in ({}, extra):
        file.write_text(json.dumps(json.loads(file.read_text()) | own))
        answers.append(answer_all(load_checkpoint(folder, "fp32", CPU), tokenizer, records, settings, 1, ranks))
    assert answers[0] == answers[1]


def test_every_record_is_answered_once_in_order(model, records, ranks):
    settings = GenerationConfig(greedy=True, batch_size=4, **SHORT)
    found = answer_all(*model, records, settings, 7, ranks)
    assert [a.index for a in found] == list(range(len(records)))
    assert [(a.prompt, a.references) for a in found] == [(r.prompt, r.outputs) for r in records]
    assert {a.seed for a in found} == {7}
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    assert [(a.rougel, a.exact_match) for a in found] == [score(a.answer, a.references, scorer) for a in found]
    assert mean_scores(found) == (statistics.fmean(a.rougel for a in found), 0.0)


def test_a_training_model_stays_one(model, records, ranks):
    student, tokenizer = model
    student.train()
    answer_all(student, tokenizer, records[:1], GenerationConfig(**SHORT), 1, ranks)
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
    first, again, other = (answer_all(*model, records, settings, seed, ranks) for seed in (1, 1, 2))
    assert [a.answer for a in first] == [a.answer for a in again]
    assert [a.answer for a in first] != [a.answer for a in other]
    assert torch.equal(torch.get_rng_state(), state)  # training goes on as if nothing had been sampled


def test_evaluate_gives_the_same_answers_on_one_and_two_processes(tiny, make_run, tmp_path):
    make_run(tmp_path)
    sizes = ["--batch-size", "3", "--max-length", "40", "--max-prompt-length", "30", "--precision", "fp32"]
    outside = {k: v for k, v in os.environ.items() if k not in rank_environment(0, 1, 0)}
    started = []
    for processes in ("1", "2"):
        command = [sys.executable, "-m", "dskd", "evaluate", tiny("llama"), "--data", tmp_path / "dev.jsonl", *sizes]
        command += ["--seeds", "10", "20", "--processes", processes, "--output", tmp_path / processes]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(list(map(str, command)), env=outside, **pipes))
    for process in started:
        out, error = process.communicate(timeout=120)
        assert process.returncode == 0, error
        assert "ROUGE-L" in out
        assert "10 records, seeds 10, 20: " in out
    one, two = ((tmp_path / n / "answers.jsonl").read_text().splitlines() for n in "12")
    assert one == two
    answers = [json.loads(line) for line in one]
    assert [(a["seed"], a["index"]) for a in answers] == [(s, i) for s in (10, 20) for i in range(10)]
    results = json.loads((tmp_path / "2" / "results.json").read_text())
    assert (results["records"], results["seeds"], results["generation"]["max_length"]) == (10, [10, 20], 40)
    by_seed = [statistics.fmean(a["rougel"] for a in answers if a["seed"] == seed) for seed in (10, 20)]
    assert results["rougel"]["by_seed"] == pytest.approx(by_seed)
    assert results["rougel"]["mean"] == pytest.approx(sum(by_seed) / 2)
    assert results["rougel"]["deviation"] == pytest.approx(abs(by_seed[0] - by_seed[1]) / 2**0.5)
