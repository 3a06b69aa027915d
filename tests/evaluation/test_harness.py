"""Tasks of lm-eval: on a task made here where it is installed, and one line where it is not."""

import json
import shutil
import sys
from functools import partial

import pytest

from dskd.config.errors import UserError
from dskd.evaluation.harness import evaluate_tasks, metrics_of, parse_tasks
from dskd.rundir.evaluations import evaluations_in

TASK = """\
task: made_up
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}} "
doc_to_choice: ["a cat", "the sea"]
doc_to_target: label
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""


def test_names_of_tasks_are_names():
    assert parse_tasks("lm-eval:arc_easy,mmlu_pro-2.1") == ["arc_easy", "mmlu_pro-2.1"]
    for wrong in ("lm-eval:", "lm-eval:a,,b", "lm-eval:../x", "lm-eval:a b", "lm-eval:/etc"):
        with pytest.raises(UserError, match="--suite: lm-eval:TASK,TASK is expected"):
            parse_tasks(wrong)


def test_without_lm_eval_it_is_one_line(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"lm-eval is not there \(lm_eval\); pip install lm-eval$"):
        evaluate_tasks(tiny("llama"), ["arc_easy"], "fp32", 2)


def test_metrics_are_those_of_the_harness_without_their_errors():
    result = {"alias": "arc", "acc,none": 0.5, "acc_stderr,none": 0.1, "exact_match,strict": 1, "acc_stderr": "N/A"}
    assert {name: value["by_seed"] for name, value in metrics_of(result).items()} == {
        "acc": [0.5],
        "exact_match,strict": [1.0],
    }


def test_a_task_is_evaluated_once_and_a_report_finds_it(tiny, tmp_path, monkeypatch):
    harness = pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    tasks = pytest.importorskip("lm_eval.tasks")
    model = shutil.copytree(tiny("llama"), tmp_path / "model")
    (tmp_path / "tasks").mkdir()
    lines = [{"question": f"Where is {city}?", "label": i % 2} for i, city in enumerate(("Lima", "Paris", "Berlin"))]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "tasks" / "made_up.yaml").write_text(TASK.format(file=tmp_path / "data.jsonl"))
    manager = tasks.TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    monkeypatch.setattr(harness, "simple_evaluate", partial(harness.simple_evaluate, task_manager=manager))
    found = evaluate_tasks(model, ["made_up"], "fp32", 2)
    assert found["made_up"]["records"] == 3
    assert 0 <= found["made_up"]["acc"]["mean"] <= 1
    assert json.loads((model / "eval/lm-eval/made_up/results.json").read_text()) == found["made_up"]
    monkeypatch.setattr(harness, "simple_evaluate", None)
    assert evaluate_tasks(model, ["made_up"], "fp32", 2) == found
    (evaluation,) = evaluations_in(model)
    assert evaluation.name == "lm-eval/made_up"
    assert evaluation.scores["acc"] == (found["made_up"]["acc"]["mean"],)
