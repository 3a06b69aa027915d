"""`dskd pipeline --cluster`, with programs in the place of Slurm's that keep a queue of their own."""

import json

import pytest
from support.cluster import dskd
from support.fake_slurm import typed

from dskd.config.load import load_run
from dskd.rundir.jobs import Jobs

REFUSED = "Batch job submission failed: Invalid account or account/partition combination specified"


@pytest.fixture
def file(make_run, tmp_path):
    """A pipeline of one run, one that starts from its model, four evaluations of that, and a run after these."""
    make_run(tmp_path, method={"kind": "sft"}, teacher=None)
    file = tmp_path / "pipeline.yaml"
    file.write_text(f"""
stages:
  last: {{run: run.yaml, after: [scores]}}
  scores: {{evaluate: second, data: [{tmp_path}/dev.jsonl, {tmp_path}/train.jsonl], seeds: [1, 2], parallel: 3}}
  second: {{run: run.yaml, student: first}}
  first: {{run: run.yaml}}
""")
    return file


@pytest.fixture
def runs(tmp_path):
    """The folder of their directories."""
    return tmp_path / "outputs/llama-pieces-untied/sft"


def pipeline(slurm, file) -> list[str]:
    """What is told of each stage."""
    lines = typed("pipeline", file, "--cluster", slurm.profile()).splitlines()
    return [line for line in lines if not line.startswith(" ")]


def waits(slurm, id_: str) -> str | None:
    return slurm.options(id_).get("dependency")


def complete(slurm, directory) -> None:
    """A run has made its last step."""
    (directory / "resume/step5").mkdir(parents=True)
    state = {"format": 1, "world_size": 1, "step": 5, "finished": True}
    (directory / "resume/step5/state.json").write_text(json.dumps(state))
    (directory / "resume/LATEST").write_text("step5\n")
    slurm.change(Jobs.at(directory).read().id, state="COMPLETED")


def test_each_stage_waits_for_the_jobs_of_those_it_needs(slurm, file, runs):
    shown = dskd("pipeline", file, "--cluster", slurm.profile()).splitlines()
    assert shown[:4] == ["first: job 101", f"  {runs}/first", "second: job 102", f"  {runs}/second"]
    assert shown[4] == "scores: jobs 103_0 to 103_3"
    assert [waits(slurm, id_) for id_ in ("101", "102", "103", "104")] == [
        None,
        "afterok:101",
        "afterok:102",
        "afterok:103",
    ]
    assert {slurm.options(id_)["kill-on-invalid-dep"] for id_ in ("102", "103", "104")} == {"yes"}
    assert "kill-on-invalid-dep" not in slurm.options("101")
    assert slurm.options("103")["array"] == "0-3%3"
    evaluations = [runs / "second/eval" / data / f"seed{seed}" for data in ("dev", "train") for seed in (1, 2)]
    for index, directory in enumerate(evaluations):
        job = Jobs.at(directory).read()
        assert job.id == f"103_{index}"
        assert job.command[3:5] == ("evaluate", str(runs / "second/best"))
    assert load_run(runs / "second/job/run.yaml").student.path == runs / "first/best"


def test_records_are_written_before_a_run_that_reads_them_and_compared_after_it(slurm, make_run, tmp_path):
    out, run = tmp_path / "texts.jsonl", make_run(tmp_path)
    file = tmp_path / "texts.yaml"
    file.write_text(f"""
stages:
  near: {{analyze: distil}}
  distil: {{run: run.yaml, settings: [data.train={out}], after: [texts]}}
  texts: {{generate: {{data: {tmp_path}/train.jsonl, out: {out}}}, teacher: sft, shards: 2}}
  sft: {{run: run.yaml, settings: [method.kind=sft, teacher=null]}}
""")
    assert pipeline(slurm, file) == ["sft: job 101", "texts: jobs 102_0 to 102_1", "distil: job 103", "near: job 104"]
    assert [waits(slurm, id_) for id_ in ("102", "103", "104")] == ["afterok:101", "afterok:102", "afterok:103"]
    shares = [tmp_path / f"texts.jsonl.0000{shard}-of-00002.job" for shard in (0, 1)]
    assert [Jobs.at(share).read().id for share in shares] == ["102_0", "102_1"]
    (distil,) = tmp_path.glob("outputs/*/*/distil")
    assert Jobs.at(distil / "eval/analysis.job").read().id == "104"
    for id_ in ("102_0", "102_1"):
        slurm.change(id_, state="COMPLETED")
    out.write_text((tmp_path / "train.jsonl").read_text())
    assert pipeline(slurm, file)[1:3] == ["texts: 2 of 2 complete already", "distil: in the queue already as 103"]
    assert load_run(distil / "job/run.yaml").data.train == out
    assert run.exists()


def test_called_again_it_submits_nothing_that_is_in_the_queue(slurm, file):
    pipeline(slurm, file)
    slurm.run("101")
    before = slurm.jobs()
    assert pipeline(slurm, file) == [
        "first: in the queue already as 101",
        "second: in the queue already as 102",
        "scores: in the queue already as 103_0, 103_1, 103_2, 103_3",
        "last: in the queue already as 104",
    ]
    assert slurm.jobs() == before
    assert len(slurm.calls("sbatch")) == 4


def test_what_is_missing_is_submitted_and_waits_for_what_is_in_the_queue(slurm, file, runs):
    pipeline(slurm, file)
    complete(slurm, runs / "first")
    slurm.run("102")
    done = runs / "second/eval/dev/seed1"
    (done / "results.json").write_text('{"rougel": {"mean": 12.5}}')
    slurm.change("103_0", state="COMPLETED")
    slurm.change("103_2", state="FAILED")
    slurm.change("103_3", state="CANCELLED")
    slurm.change("104", state="CANCELLED")
    assert pipeline(slurm, file) == [
        "first: 1 of 1 complete already",
        "second: in the queue already as 102",
        "scores: jobs 105_0 to 105_1, in the queue already as 103_1, 1 of 4 complete already",
        "last: job 106",
    ]
    assert (waits(slurm, "105"), waits(slurm, "106")) == ("afterok:102", "afterok:103_1:105")
    assert [Jobs.at(runs / "second/eval/train" / seed).read().id for seed in ("seed1", "seed2")] == ["105_0", "105_1"]


def test_what_is_complete_is_not_waited_for(slurm, file, runs):
    pipeline(slurm, file)
    complete(slurm, runs / "first")
    slurm.forget("101", accounted=False)
    slurm.change("102", state="FAILED")
    assert pipeline(slurm, file)[:2] == ["first: 1 of 1 complete already", "second: job 105"]
    assert waits(slurm, "105") is None


def test_if_one_is_refused_those_that_were_submitted_before_it_are_cancelled(slurm, file, runs):
    slurm.tell(answers=["", "", REFUSED])
    line = typed("pipeline", file, "--cluster", slurm.profile(), code=2)
    assert line == f"dskd: sbatch refused: {REFUSED}; change account (cluster profile)"
    assert {id_: job["state"] for id_, job in slurm.jobs().items()} == {"101": "CANCELLED", "102": "CANCELLED"}
    assert slurm.calls("scancel") == [["101", "102"]]
    assert not list(runs.glob("second/eval/**/job.json"))
    assert pipeline(slurm, file)[2] == "scores: jobs 105_0 to 105_3"


def test_a_refusal_leaves_the_jobs_of_earlier_calls_alone(slurm, file, runs):
    pipeline(slurm, file)
    for id_ in ("102", "103_0", "103_1", "103_2", "103_3", "104"):
        slurm.change(id_, state="FAILED")
    slurm.tell(answers=["", REFUSED])
    typed("pipeline", file, "--cluster", slurm.profile(), code=2)
    assert (slurm.state("101"), slurm.state("105")) == ("PENDING", "CANCELLED")
    assert slurm.calls("scancel") == [["105"]]
