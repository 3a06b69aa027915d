"""Live trackers get every figure, and can neither stop nor hold up a training.

wandb and mlflow are stood in for by small packages with those of their functions that are called, as documented: the
real ones are hundreds of megabytes.
"""

import json
import re
import sys
from dataclasses import replace

import pytest

from dskd.config.changes import changed, harmful
from dskd.config.load import load_run
from dskd.config.report import ReportConfig
from dskd.engine import trackers
from dskd.engine.metrics import Monitor
from dskd.rundir.layout import RunDirectory

WANDB = """
import json, os
class Settings:
    def __init__(self, console, disable_git, disable_code, save_code, silent):
        assert (console, disable_git, disable_code, save_code) == ("off", True, True, False)
class Run:
    def define_metric(self, name, step_metric): tell({"define": [name, step_metric]})
    def log(self, data): tell(data)
    def finish(self): tell({"finish": True})
def init(*, project, name, group, id, resume, dir, config, settings):
    tell({"project": project, "name": name, "id": id, "resume": resume, "seed": config["train"]["seed"]})
    return Run()
def tell(value):
    with open(os.environ["TOLD"], "a") as out: out.write(json.dumps(value) + "\\n")
"""
MLFLOW = """
import json, os
from types import SimpleNamespace
from mlflow.entities import Metric, Param
class MlflowClient:
    def get_experiment_by_name(self, name):
        return SimpleNamespace(experiment_id="7") if "experiment" in told() else None
    def create_experiment(self, name):
        tell({"experiment": name})
        return "7"
    def search_runs(self, experiment_ids, filter_string, max_results):
        assert experiment_ids == ["7"]
        tag = filter_string.split("'")[1]
        return [SimpleNamespace(info=SimpleNamespace(run_id="9"))] if f'"dskd": "{tag}"' in told() else []
    def update_run(self, run_id, status): tell({"update": [run_id, status]})
    def create_run(self, experiment_id, tags, run_name):
        tell({"create": run_name, "tags": tags})
        return SimpleNamespace(info=SimpleNamespace(run_id="9"))
    def log_batch(self, run_id, metrics=(), params=()):
        assert run_id == "9" and len(params) <= 100
        tell({"params": dict((p.key, p.value) for p in params), "metrics": [[m.key, m.value, m.step] for m in metrics]})
    def set_terminated(self, run_id): tell({"end": run_id})
def told():
    return open(os.environ["TOLD"]).read() if os.path.exists(os.environ["TOLD"]) else ""
def tell(value):
    with open(os.environ["TOLD"], "a") as out: out.write(json.dumps(value) + "\\n")
"""
ENTITIES = """
from collections import namedtuple
Metric = namedtuple("Metric", "key value timestamp step")
Param = namedtuple("Param", "key value")
"""


@pytest.fixture
def run(make_run, tmp_path):
    """A run that wants both trackers; its directory is there."""
    found = replace(load_run(make_run(tmp_path)), report=ReportConfig(("wandb", "mlflow")))
    found.directory.mkdir(parents=True)
    return found


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """`packages(wandb=source, mlflow=source)` makes these packages importable; returns what they were told."""

    def make(**sources):
        for name in ("wandb", "mlflow", "mlflow.entities"):
            monkeypatch.delitem(sys.modules, name, raising=False)
        for name, source in sources.items():
            folder = tmp_path / "packages" / name
            folder.mkdir(parents=True)
            (folder / "__init__.py").write_text(source)
            (folder / "entities.py").write_text(ENTITIES)
        monkeypatch.syspath_prepend(tmp_path / "packages")
        monkeypatch.setenv("TOLD", str(tmp_path / "told"))

    def told():
        return [json.loads(line) for line in (tmp_path / "told").read_text().splitlines()]

    yield make, told
    for name in ("wandb", "mlflow", "mlflow.entities"):
        sys.modules.pop(name, None)


def make_steps(run, first, last):
    place = RunDirectory.of(run)
    with Monitor(place, 4, is_main=True, done=first - 1, run=run) as monitor:
        for step in range(first, last + 1):
            monitor.step({"step": step, "loss": 1 / step, "tokens_per_second": 5.0, "seconds": 0.1})
    return place.log.read_text()


def test_both_get_each_figure_and_the_settings_and_go_on_after_a_restart(run, packages):
    make, told = packages
    make(wandb=WANDB, mlflow=MLFLOW)
    assert "report.trackers" not in make_steps(run, 1, 2) + make_steps(run, 3, 3)
    found = told()
    begun = [line for line in found if "project" in line]
    assert [(line["project"], line["resume"], line["seed"]) for line in begun] == [("dskd", "allow", 10)] * 2
    assert begun[0]["id"] == begun[1]["id"]
    assert begun[0]["name"] == "/".join(run.directory.parts[-3:])
    assert [line["loss"] for line in found if "loss" in line] == [1.0, 0.5, 1 / 3]
    assert [line["step"] for line in found if "loss" in line] == [1, 2, 3]
    assert len([line for line in found if "create" in line]) == 1
    assert [line["update"] for line in found if "update" in line] == [["9", "RUNNING"]]
    metrics = [metric for line in found for metric in line.get("metrics", [])]
    assert [metric[1:] for metric in metrics if metric[0] == "loss"] == [[1.0, 1], [0.5, 2], [1 / 3, 3]]
    params = {key: value for line in found for key, value in line.get("params", {}).items()}
    assert params["method.kind"] == "dskd_cma"
    assert sum("finish" in line for line in found) == sum("end" in line for line in found) == 2


def test_one_that_is_not_installed_is_told_once_at_the_start(run, packages, monkeypatch):
    make, told = packages
    make(wandb=WANDB)
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None if name == "mlflow" else name)
    lines = make_steps(run, 1, 3).splitlines()
    assert lines[0].endswith("report.trackers: mlflow gets nothing, it is not installed here: pip install mlflow")
    assert sum("report.trackers" in line for line in lines) == 1
    assert sum("loss" in line for line in told()) == 3


def test_an_error_is_told_once_without_secrets_and_nothing_ends_by_it(run, packages, monkeypatch):
    make, _ = packages
    monkeypatch.setenv("WANDB_API_KEY", "abcdef123456")
    broken = "def init(**k): raise RuntimeError('no https://me:hunter2@host/api with abcdef123456')\nSettings = dict\n"
    make(wandb=broken, mlflow="import sys\nsys.exit(3)\n")
    log = make_steps(run, 1, 3)
    (line,) = [line for line in log.splitlines() if "wandb" in line]
    assert line.endswith("report.trackers: wandb gets nothing more: RuntimeError: no https://***@host/api with ***")
    assert re.search(r"mlflow gets nothing more: SystemExit: 3", log)
    assert [json.loads(line)["step"] for line in RunDirectory.of(run).metrics.read_text().splitlines()] == [1, 2, 3]


def test_one_that_hangs_is_not_waited_for(run, packages, monkeypatch):
    make, _ = packages
    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 0.2)
    monkeypatch.setattr(trackers, "WAITING", 2)
    make(wandb="import threading\nSettings = dict\ndef init(**k): threading.Event().wait()\n")
    log = make_steps(replace(run, report=ReportConfig(("wandb",))), 1, 4)
    assert "report.trackers: wandb has not taken all within 0 s; it misses the rest" in log


def test_a_run_may_get_trackers_when_it_goes_on(run):
    assert harmful(changed(replace(run, report=ReportConfig()), run)) == {}
