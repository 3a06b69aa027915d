"""`dskd evaluate` as typed: the same answers on any number of processes and after any stop; what is there is used."""

import json
import shutil
import signal
import statistics

import pytest
from support.forms import as_file, chatting, conversations
from support.starts import Start, end_all, finish
from support.tiny import varied_records, write_records

from dskd.config.suites import SUITES
from dskd.config.training import GenerationConfig
from dskd.evaluation.evaluate import Asked, Evaluation
from dskd.evaluation.scores import average

SHORT = ("--max-length", "40", "--max-prompt-length", "30", "--precision", "fp32")


@pytest.fixture(autouse=True)
def nothing_stays():
    yield
    end_all()


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    return write_records(tmp_path_factory.mktemp("records") / "dev.jsonl", varied_records(10, start=100))


def test_one_and_two_processes_and_a_run_that_was_stopped_give_the_same_answers(tiny, records, tmp_path):
    command = ("evaluate", tiny("llama"), "--data", records, *SHORT, "--batch-size", "3", "--seeds", "10 20 30")
    said = finish(tmp_path / "log", *command, "--output", tmp_path / "one")
    assert "ROUGE-L" in said
    assert "10 records, seeds 10, 20, 30: " in said
    stopped, partial = tmp_path / "stopped", tmp_path / "stopped" / "answers.partial.jsonl"
    start = Start(tmp_path / "log", *command, "--output", stopped, ranks=2)
    assert start.until(lambda: partial.is_file() and partial.read_bytes().count(b"{") > 1)
    start.send(signal.SIGTERM)
    assert start.wait() == [75, 75], start.text()
    assert "stopped as asked; go on with the same command" in start.text()
    assert not (stopped / "results.json").exists()
    finish(tmp_path / "log", *command, "--output", stopped, ranks=2)
    assert not partial.exists()
    one, two = ((folder / "answers.jsonl").read_text() for folder in (tmp_path / "one", stopped))
    assert one == two
    answers = [json.loads(line) for line in one.splitlines()]
    assert [(a["seed"], a["index"]) for a in answers] == [(s, i) for s in (10, 20, 30) for i in range(10)]
    results = json.loads((stopped / "results.json").read_text())
    assert (results["records"], results["seeds"]) == (10, [10, 20, 30])
    assert results["generation"]["max_length"] == 40
    by_seed = [statistics.fmean(a["rougel"] for a in answers if a["seed"] == seed) for seed in (10, 20, 30)]
    assert results["rougel"]["by_seed"] == pytest.approx(by_seed)
    assert results["rougel"]["mean"] == pytest.approx(statistics.fmean(by_seed))
    assert results["rougel"]["deviation"] == pytest.approx(statistics.stdev(by_seed))


# What is there already


class Counted(Evaluation):
    """Counts the prompts that its model is given."""

    def evaluate(self, data, output):
        prompts = []
        model = self.answering.model
        with model.register_forward_pre_hook(
            lambda *call: prompts.append(call[2]["input_ids"].shape), with_kwargs=True
        ):
            results = super().evaluate(data, output)
        return results, sum(rows for rows, tokens in prompts if tokens > 1)


@pytest.fixture(scope="module")
def ask(tiny, records, ranks):
    """Evaluate the records in a folder: (results, how many prompts were run)."""

    def asked(folder, *seeds, temperature=1.0):
        settings = GenerationConfig(temperature=temperature, max_length=40, max_prompt_length=30, batch_size=2)
        return Counted(Asked(tiny("llama"), seeds, settings, "fp32"), ranks).evaluate(records, folder)

    return asked


@pytest.fixture(scope="module")
def finished(ask, tmp_path_factory):
    """A folder with answers of two seeds."""
    folder = tmp_path_factory.mktemp("finished")
    assert ask(folder, 1, 2)[1] >= 20
    return folder


@pytest.fixture
def again(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "again")


@pytest.mark.parametrize("form", ["csv", "chat"])
def test_records_of_any_form_are_answered_alike(tiny, ranks, tmp_path, form):
    chats, plain = conversations(4)
    data = as_file(tmp_path, "jsonl", chats) if form == "chat" else as_file(tmp_path, "csv", plain)
    lines = write_records(tmp_path / "plain.jsonl", plain)
    settings = GenerationConfig(max_length=40, max_prompt_length=30, batch_size=2)
    asked = Asked(chatting(tiny, "llama", tmp_path), (1,), settings, "fp32")
    for file in (data, lines):
        assert Evaluation(asked, ranks).evaluate(file, tmp_path / f"to-{file.stem}")["records"] == 4
    answers = [(tmp_path / f"to-{file.stem}" / "answers.jsonl").read_bytes() for file in (data, lines)]
    assert answers[0] == answers[1]


def test_what_is_complete_is_not_answered_again(ask, again):
    before = (again / "answers.jsonl").read_bytes()
    results = json.loads((again / "results.json").read_text())
    (again / "results.json").write_text(json.dumps(results | {"judge": {"mean": 1.0}}))
    assert ask(again, 1, 2) == (results, 0)
    assert (again / "answers.jsonl").read_bytes() == before
    assert json.loads((again / "results.json").read_text()) == results | {"judge": {"mean": 1.0}}


def test_a_further_seed_is_answered_beside_those_that_are_there(ask, again):
    results, prompts = ask(again, 1, 2, 3)
    assert 10 <= prompts < 20
    assert results["seeds"] == [1, 2, 3]
    assert ask(again, 1, 2, 3)[1] == 0


def test_jobs_of_single_seeds_make_one_evaluation(ask, finished, tmp_path):
    for seed in (1, 2):
        ask(tmp_path / f"seed{seed}", seed)
    assert ask(tmp_path, 1, 2)[1] == 0
    assert (tmp_path / "answers.jsonl").read_bytes() == (finished / "answers.jsonl").read_bytes()


def test_other_settings_or_another_model_are_another_evaluation(ask, again, tiny, records, ranks):
    assert ask(again, 1, 2, temperature=0.5)[1] >= 20
    asked = Asked(tiny("llama"), (1,), GenerationConfig(), "fp32")
    other = Asked(tiny("gpt2"), (1,), GenerationConfig(), "fp32")
    assert asked.identity(records) != other.identity(records)


def test_damaged_lines_are_answered_again_with_all_of_their_batch(ask, again, finished):
    lines = (again / "answers.jsonl").read_text().splitlines()
    identity = json.dumps({"identity": json.loads((again / "results.json").read_text())["identity"]})
    (again / "results.json").unlink()
    (again / "answers.jsonl").unlink()
    lines[3] = lines[3].replace('"index": 3', '"index": 99')
    lines[5] = lines[5].replace('"seed"', '"sed"')
    (again / "answers.partial.jsonl").write_text("\n".join([identity, *lines[:-1], lines[-1][:40]]))
    assert 3 <= ask(again, 1, 2)[1] < 20
    assert (again / "answers.jsonl").read_bytes() == (finished / "answers.jsonl").read_bytes()
    assert not (again / "answers.partial.jsonl").exists()


# A suite


def test_a_suite_is_evaluated_set_by_set(tiny, tmp_path):
    model = shutil.copytree(tiny("llama"), tmp_path / "model")
    for number, file in enumerate(SUITES["paper"].values()):
        (tmp_path / "data" / file).parent.mkdir(parents=True, exist_ok=True)
        write_records(tmp_path / "data" / file, varied_records(1, start=number))
    options = ("--suite", "paper", "--data-root", tmp_path / "data", *SHORT, "--seeds", "1 2")
    said = finish(tmp_path / "log", "evaluate", model, *options)
    found = [json.loads((model / "eval" / name / "results.json").read_text()) for name in SUITES["paper"]]
    assert [result["seeds"] for result in found] == [[1, 2]] * 5
    mean = average(found)["rougel"]
    assert f"average of 5 sets\nROUGE-L {mean['mean']:.2f} +- {mean['deviation']:.2f}\n" in said
    assert mean["by_seed"] == pytest.approx([sum(r["rougel"]["by_seed"][i] for r in found) / 5 for i in (0, 1)])
