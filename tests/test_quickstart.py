"""The quick start, but for its minutes of training: what it runs, and the table that it prints of what was found."""

import json

import pytest
from rich.console import Console

from dskd.config.cluster import ClusterConfig
from dskd.config.recipes import recipes_folder
from dskd.launch.pipeline import read_pipeline
from dskd.quickstart import REPORT, TRAINED, copy_records, outcome, show, summary
from dskd.rundir.layout import ANSWERS, RESULTS, RunDirectory

RECIPES = recipes_folder() / "quickstart"


@pytest.fixture
def stages(tiny, tmp_path, monkeypatch):
    """Read where tiny models stand for those that it writes."""
    folder = tmp_path / "outputs" / "quickstart"
    (folder / "records").mkdir(parents=True)
    (folder / "teacher").symlink_to(tiny("llama"))
    (folder / "tokenizer").symlink_to(tiny("mistral"))
    copy_records(RECIPES, folder / "records")
    monkeypatch.chdir(tmp_path)
    return {stage.name: stage for stage in read_pipeline(RECIPES / "pipeline.yaml", ClusterConfig())}


def test_both_methods_train_one_student_alike_from_one_teacher_with_two_seeds(stages):
    sft, cma = stages["sft"], stages["dskd_cma"]
    assert (sft.run.method.kind, cma.run.method.kind) == ("sft", "dskd_cma")
    assert sft.run.student.path == cma.run.student.path == stages["student"].best
    assert sft.run.data == cma.run.data
    assert sft.run.train == cma.run.train
    assert cma.run.teacher.path == stages["tuned"].best
    assert cma.run.teacher.backend == "cache"
    assert [len(stage.requests) for stage in (sft, cma)] == [2, 2]
    assert {f"scores_{name}" for name in TRAINED} <= stages.keys()
    assert any(part.endswith(str(REPORT.absolute())) for part in stages["report"].requests[0].command)
    assert set(stages["report"].needs) >= {"sft", "dskd_cma", "scores_sft", "scores_dskd_cma"}


def test_no_question_of_the_test_is_among_those_of_the_training():
    sets = {
        name: {json.loads(line)["prompt"] for line in (RECIPES / f"{name}.jsonl").read_text().splitlines()}
        for name in ("train", "dev", "test")
    }
    assert [len(sets[name]) for name in sets] == [446, 48, 48]
    assert not sets["train"] & (sets["dev"] | sets["test"])


def test_the_table_tells_mean_and_deviation_of_the_best_models(stages):
    losses = {"tuned": [[0.5]], "sft": [[1.5, 1.4], [1.2, 1.6]], "dskd_cma": [[1.3, 1.1], [1.0, 0.9]]}
    rougel = {"tuned": [80.0], "sft": [60.0, 64.0], "dskd_cma": [70.0, 70.5]}
    for name in TRAINED:
        for request, own in zip(stages[name].requests, losses[name], strict=True):
            request.directory.mkdir(parents=True)
            lines = [json.dumps({"step": i, "dev_loss": loss, "dev_accuracy": 0.5}) for i, loss in enumerate(own)]
            RunDirectory(request.directory).metrics.write_text("\n".join(lines) + "\n")
        for request, score in zip(stages[f"scores_{name}"].requests, rougel[name], strict=True):
            request.directory.mkdir(parents=True)
            (request.directory / RESULTS).write_text(json.dumps({"rougel": {"mean": score}}))
            answered = {"prompt": "Question: Why?\nAnswer:", "answer": f"As {name}."}
            (request.directory / ANSWERS).write_text(json.dumps(answered) + "\n")
    console = Console(record=True, width=120)
    outcomes = [outcome(text, stages[name], stages[f"scores_{name}"]) for name, text in TRAINED.items()]
    show(console, outcomes, 2.5)
    text = console.export_text()
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]
    assert rows == [
        ["teacher, fine-tuned", "0.500", "50.0", "80.0"],
        ["SFT", "1.300 ± 0.141", "50.0 ± 0.0", "62.0 ± 2.8"],
        ["DSKD-CMA", "1.000 ± 0.141", "50.0 ± 0.0", "70.2 ± 0.4"],
    ]
    assert "The first question of the test: Question: Why? Answer:" in text
    assert "DSKD-CMA: As dskd_cma." in text
    assert f"Report: {REPORT.absolute()}\n" in text


def test_one_number_has_no_deviation():
    assert summary([1.0], 2) == "1.00"
