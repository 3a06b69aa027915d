"""Answers and their scores: every record once, the same however the work is split."""

import json
import os
import subprocess
import sys

import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer
from transformers import AutoModelForCausalLM, AutoTokenizer

from dskd.config.training import GenerationConfig
from dskd.data.records import read_records
from dskd.engine import distributed
from dskd.evaluate import answer_all, generate, normalize, score, summary
from dskd.launch.local import free_port, rank_environment

SHORT = {"max_length": 40, "max_prompt_length": 30}


@pytest.fixture(scope="module")
def ranks():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in rank_environment(0, 1, free_port()).items():
            patch.setenv(name, value)
        yield distributed.start()
        distributed.stop()


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


def test_normalized_text():
    assert normalize(" It's  a\nTEST. ") == "its a test"


def test_mean_and_deviation_over_seeds():
    found = summary([(10.0, 0.0), (20.0, 50.0)])
    assert found["rougel"] == {"mean": 15.0, "deviation": pytest.approx(7.0710678), "by_seed": [10.0, 20.0]}
    assert found["exact_match"]["mean"] == 25.0
    assert summary([(10.0, 0.0)])["rougel"]["deviation"] == 0.0


def test_left_padding_changes_no_greedy_answer(model, ranks):
    student, tokenizer = model
    prompts = [tokenizer.encode(text, add_special_tokens=False) for text in ("Where is", "Question 3: Where is Lima?")]
    settings = GenerationConfig(greedy=True, **SHORT)
    for prompt, answer in zip(prompts, generate(student, tokenizer, prompts, settings, ranks), strict=True):
        budget = 40 - max(map(len, prompts))
        alone = student.generate(input_ids=torch.tensor([prompt]), max_new_tokens=budget, do_sample=False)
        assert answer == tokenizer.decode(alone[0, len(prompt) :], skip_special_tokens=True)


def test_every_record_is_answered_once_in_order_whatever_the_batch(model, records, ranks):
    found = {}
    for size in (1, 4):
        settings = GenerationConfig(greedy=True, batch_size=size, max_length=44, max_prompt_length=30)
        found[size] = answer_all(*model, records, settings, 1, ranks)
        assert [a.index for a in found[size]] == list(range(len(records)))
        assert [a.references for a in found[size]] == [r.outputs for r in records]
    same = [a.answer[:4] == b.answer[:4] for a, b in zip(found[1], found[4], strict=True)]
    assert all(same)


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
    for processes in ("1", "2"):
        command = [sys.executable, "-m", "dskd", "evaluate", tiny("llama"), "--data", tmp_path / "dev.jsonl", *sizes]
        command += ["--seeds", "10 20", "--processes", processes, "--output", tmp_path / processes]
        outside = {k: v for k, v in os.environ.items() if k not in rank_environment(0, 1, 0)}
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=outside, check=False)
        assert done.returncode == 0, done.stderr
        assert "ROUGE-L" in done.stdout
    one, two = ((tmp_path / n / "answers.jsonl").read_text().splitlines() for n in "12")
    assert one == two
    assert [(a["seed"], a["index"]) for a in map(json.loads, one)] == [(s, i) for s in (10, 20) for i in range(10)]
    results = json.loads((tmp_path / "2" / "results.json").read_text())
    assert results["records"] == 10
    assert len(results["rougel"]["by_seed"]) == 2
    assert results["rougel"]["deviation"] >= 0
