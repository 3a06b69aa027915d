"""Stages of a pipeline that let a model write records, and that compare a student with its teacher."""

import pytest
import typer.main
from support.pipelines import typed

from dskd.cli import app
from dskd.config.cluster import ClusterConfig, ContainerConfig
from dskd.config.errors import UserError
from dskd.launch.pipeline import read_pipeline
from dskd.rundir.jobs import Jobs
from dskd.rundir.layout import RunDirectory, part_of

HERE = ClusterConfig()


def containers(**keys: object) -> ClusterConfig:
    return ClusterConfig(container=ContainerConfig("docker", "image"), **keys)


def parsed(request) -> dict[str, object]:
    """What the command line's own parser reads of the command of a job, in a container or not."""
    words = list(request.command)
    verb, *arguments = words[next(i for i, word in enumerate(words) if word in ("generate", "analyze")) :]
    command = typer.main.get_command(app).commands[verb]
    return command.make_context(verb, arguments).params


TEXTS = {"data": "{folder}/dev.jsonl", "out": "{folder}/texts.jsonl", "seed": 3, "whole": True}


@pytest.fixture
def texts(folder):
    return {key: value.format(folder=folder) if isinstance(value, str) else value for key, value in TEXTS.items()}


def test_a_teacher_writes_records_in_shares_that_another_stage_trains_on(folder, write, texts):
    out = folder / "texts.jsonl"
    stages = {
        "sft": {"run": "run.yaml"},
        "texts": {"generate": texts, "teacher": "sft", "shards": 3, "parallel": 2, "generation": {"top_p": 0.5}},
        "healed": {"run": "run.yaml", "settings": [f"data.train={out}"], "after": ["texts"]},
        "next": {"run": "run.yaml", "student": "healed", "settings": [f"data.train={out}"]},
    }
    sft, written, healed, further = read_pipeline(write(stages), ClusterConfig(hours=7))
    for shard, request in enumerate(written.requests):
        found = parsed(request)
        assert (found["model"], found["data"], found["out"]) == (sft.best, folder / "dev.jsonl", out)
        assert (found["shard"], found["seed"], found["whole"]) == (f"{shard}/3", 3, True)
        assert (found["top_p"], found["engine"], found["processes"]) == (0.5, "dskd", None)
        assert request.directory == folder / f"texts.jsonl.0000{shard}-of-00003.job"
        assert (request.tasks_per_node, request.hours) == (1, 7)
    assert len(written.requests) == 3
    assert written.needs == ("sft",)
    assert [stage.run.data.train for stage in (healed, further)] == [out, out]
    stages["healed"]["after"] = []
    with pytest.raises(UserError, match=f"^data.train: no such file: {out}"):
        read_pipeline(write(stages), HERE)
    done = typed(write(stages | {"healed": {"run": "run.yaml"}, "next": {"run": "run.yaml"}}), "--local", "--dry-run")
    assert done.stdout.count(" generate ") == 3
    assert "#SBATCH --array=0-2%2" in typed(write({k: stages[k] for k in ("sft", "texts")}), *SUBMITTED).stdout
    out.write_text("{}")
    try:
        assert next(stage for stage in read_pipeline(write(stages), HERE) if stage.name == "texts").open == ()
    finally:
        out.unlink()


SUBMITTED = ("--cluster", "local", "--dry-run")


def test_a_student_is_made_with_records_that_a_model_of_a_folder_writes(folder, write, texts, tiny, tmp_path):
    model = tiny("llama")
    stages = {
        "texts": {"generate": texts | {"model": str(model)}, "processes": 2},
        "made": {
            "make": {"model": str(model), "out": str(tmp_path / "made"), "records": texts["out"]},
            "after": ["texts"],
        },
    }
    written, made = read_pipeline(write(stages), containers(gpus_per_node=2))
    (request,) = written.requests
    assert f"--mount=type=bind,source={model},target={model},readonly" in request.command
    assert f"--mount=type=bind,source={folder},target={folder}" in request.command
    assert request.tasks_per_node == 2
    assert f"--records={texts['out']}" in made.requests[0].command
    for change, problem in (
        ({"model": str(tmp_path)}, f"{tmp_path}: no config.json in {tmp_path}"),
        ({"data": f"{folder}/none.jsonl"}, "generate.data: no such file: "),
        ({"out": f"{folder}/dev.jsonl/x"}, "generate.out: cannot write "),
        ({"engine": "vllm"}, "processes: vLLM starts its own; leave it out"),
    ):
        stages["texts"]["generate"] = texts | {"model": str(model)} | change
        with pytest.raises(UserError, match=f"^{problem}"):
            read_pipeline(write(stages), containers(gpus_per_node=2))


def test_an_adapter_writes_records_with_the_model_that_it_belongs_to(write, texts, tiny):
    stages = {
        "sft": {"run": "run.yaml", "settings": ["student.lora.rank=2"]},
        "texts": {"generate": texts, "teacher": "sft"},
    }
    sft, written = read_pipeline(write(stages), containers())
    assert parsed(written.requests[0])["model"] == sft.best
    for model in (sft.best, tiny("llama")):
        assert f"--mount=type=bind,source={model},target={model},readonly" in written.requests[0].command


def test_each_run_of_a_stage_is_compared_with_its_teacher(write, make_run, tmp_path):
    file = make_run(tmp_path)
    stages = {
        "distil": {"run": str(file), "train_seeds": [1, 2]},
        "near": {"analyze": "distil", "records": 7, "precision": "fp32"},
        "page": {"report": str(tmp_path / "report.html")},
    }
    distil, near, page = read_pipeline(write(stages), containers())
    directories = [request.directory for request in distil.requests]
    for request, directory in zip(near.requests, directories, strict=True):
        words, found = list(request.command), parsed(request)
        assert (found["model"], found["records"], found["precision"]) == (directory, 7, "fp32")
        assert (found["teacher"], found["data"], found["lengths"]) == (None, None, None)
        assert f"--mount=type=bind,source={tmp_path}/outputs,target={tmp_path}/outputs" in words
        for model in (distil.run.student.path, distil.run.teacher.path):
            assert f"--mount=type=bind,source={model},target={model},readonly" in words
    assert page.needs == ("distil", "near")
    near.requests[0].result.parent.mkdir(parents=True)
    near.requests[0].result.write_text("{}")
    assert near.requests[0].result == directories[0] / "analysis.json"
    assert near.open == near.requests[1:]


def test_jobs_that_are_in_the_queue_already_do_not_look_like_a_run_that_has_begun(write, make_run, tmp_path):
    stages = {"distil": {"run": str(make_run(tmp_path))}, "near": {"analyze": "distil"}}
    distil, near = read_pipeline(write(stages), HERE)
    Jobs.at(near.requests[0].directory).make_folder()
    directory = RunDirectory(distil.requests[0].directory)
    assert near.requests[0].directory.is_relative_to(directory.path)
    assert not directory.has_begun()


def test_progress_of_a_share_is_what_it_has_written(tmp_path):
    jobs = Jobs.at(tmp_path / "texts.jsonl.00001-of-00004.job")
    assert jobs.state() == ""
    part = part_of(tmp_path / "texts.jsonl", 1, 4)
    part.write_text('{"identity": "x"}\n{"index": 1}\n{"index": 5}\n')
    assert (jobs.state(), jobs.kept()) == ("record2", "2 answers")
