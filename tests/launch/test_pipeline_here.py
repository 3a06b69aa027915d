"""`dskd pipeline --local` for real: a teacher writes records, a student learns from them and is compared with it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.starts import Start, end_all

from dskd.config.cluster import ClusterConfig
from dskd.data.records import read_records
from dskd.launch import here
from dskd.launch.here import run_here, run_jobs, share_of, visible_gpus
from dskd.launch.pipeline import read_pipeline
from dskd.launch.request import Request
from dskd.rundir.analysis import read_analysis


@pytest.fixture
def started(tmp_path, monkeypatch):
    """The verbs that were started, in their order."""
    verbs = []

    def run(name, requests, parallel):
        codes = []
        for request in requests:
            here.begin(name, request)
            verbs.append(request.command[3])
            start = Start(tmp_path / "log", *request.command[3:])
            codes += start.wait()
            assert codes[-1] == 0, start.text()[-3000:]
        return codes

    monkeypatch.setattr(here, "run_jobs", run)
    yield verbs
    end_all()


def test_a_student_learns_from_what_its_teacher_has_written(make_run, tmp_path, started):
    make_run(tmp_path, train={"max_steps": 2}, method={"kind": "kd"})
    out = tmp_path / "texts" / "seqkd.jsonl"
    short = {"max_length": 40, "max_prompt_length": 32, "batch_size": 4}
    texts = {"data": str(tmp_path / "dev.jsonl"), "out": str(out), "seed": 3}
    sft = ["method.kind=sft", "teacher=null"]
    stages = {
        "taught": {"run": "run.yaml", "settings": sft},
        "texts": {"generate": texts, "teacher": "taught", "shards": 2, "generation": short, "precision": "fp32"},
        "distil": {"run": "run.yaml", "settings": [f"data.train={out}"], "after": ["texts"]},
        "near": {"analyze": "distil", "records": 4, "precision": "fp32"},
    }
    file = tmp_path / "pipeline.yaml"
    file.write_text(json.dumps({"stages": stages}))
    assert run_here(read_pipeline(file, ClusterConfig())) == 0
    assert started == ["train", "generate", "generate", "train", "analyze"]
    asked, made = read_records(tmp_path / "dev.jsonl"), read_records(out)
    assert {record.prompt for record in made} <= {record.prompt for record in asked}
    card = json.loads((out.parent / "seqkd.jsonl.card.json").read_text())
    assert (card["prompts"], card["records"], card["seed"]) == (len(asked), len(made), 3)
    assert list(out.parent.glob("*.partial")) == []
    (distil,) = tmp_path.glob("outputs/*/kd/distil")
    assert json.loads((distil / "args.json").read_text())["content"]["by_key"]["data.train"]["path"] == str(out)
    assert read_analysis(distil).records <= 4
    assert run_here(read_pipeline(file, ClusterConfig())) == 0
    assert len(started) == 5  # nothing again


def job(folder: Path, code: str) -> Request:
    """A job that runs Python code in `folder`."""
    command = (sys.executable, "-c", f"import os; os.chdir({str(folder)!r})\n{code}")
    return Request(folder, "job", command, nodes=1, tasks_per_node=1, hours=1.0)


MET = """
import pathlib, time
pathlib.Path(str(os.getpid())).touch()
deadline = time.monotonic() + 20
while len(list(pathlib.Path().iterdir())) < 2 and time.monotonic() < deadline:
    time.sleep(0.05)
raise SystemExit(0 if len(list(pathlib.Path().iterdir())) == 2 else 1)
"""


def test_jobs_of_a_stage_run_at_the_same_time_where_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert run_jobs("two", [job(tmp_path, MET), job(tmp_path, MET + "# 2")], 2) == [0, 0]


def test_a_job_that_fails_beside_others_shows_the_end_of_what_it_wrote(tmp_path, capfd):
    jobs = [job(tmp_path, "print('well')"), job(tmp_path, "print('why'); raise SystemExit(3)")]
    assert sorted(run_jobs("both", jobs, 2)) == [0, 3]
    said = capfd.readouterr().err
    assert "failed; the end of what it wrote:\nwhy" in said
    assert "well" not in said


def test_each_of_several_jobs_has_its_share_of_gpus_or_processors(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,3,5")
    gpus = visible_gpus()
    assert [share_of(gpus, i, 2)["CUDA_VISIBLE_DEVICES"] for i in range(2)] == ["0,5", "3"]
    assert share_of(gpus, 0, 1) == {}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert visible_gpus() == []
    assert share_of([], 1, 2) == {"OMP_NUM_THREADS": "4"}
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert share_of([], 1, 2) == {}


def test_a_signal_reaches_the_job_that_runs_and_no_other_begins(tmp_path):
    waits = "import pathlib, signal, time; signal.signal(signal.SIGTERM, lambda *_: os._exit(75))\n"
    waits += "pathlib.Path('runs').touch(); time.sleep(30)"
    code = f"""
import sys
from pathlib import Path
sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]!r}
from test_pipeline_here import job
from dskd.launch.here import run_jobs
folder = Path({str(tmp_path)!r})
print(run_jobs("one", [job(folder, {waits!r}), job(folder, "import pathlib; pathlib.Path('next').touch()")], 1))
"""
    started = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "runs").exists():
        assert time.monotonic() < deadline
        assert started.poll() is None
        time.sleep(0.05)
    started.send_signal(signal.SIGTERM)
    assert started.communicate(timeout=30)[0].splitlines()[-1] == "[75, 75]"
    assert not (tmp_path / "next").exists()
