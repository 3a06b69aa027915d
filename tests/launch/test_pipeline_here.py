"""`dskd pipeline --local` for real: a teacher writes records, a student learns from them and is compared with it."""

import json
from types import SimpleNamespace

import pytest
from support.starts import Start, end_all

from dskd.config.cluster import ClusterConfig
from dskd.data.records import read_records
from dskd.launch import pipeline
from dskd.launch.pipeline import read_pipeline, run_here
from dskd.rundir.analysis import read_analysis


@pytest.fixture
def started(tmp_path, monkeypatch):
    """The verbs that were started, in their order."""
    verbs = []

    def run(command, check):
        verbs.append(command[3])
        start = Start(tmp_path / "log", *command[3:])
        (code,) = start.wait()
        assert code == 0, start.text()[-3000:]
        return SimpleNamespace(returncode=code)

    monkeypatch.setattr(pipeline, "subprocess", SimpleNamespace(run=run))
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
