"""Pipelines before they are submitted: what a stage asks of `dskd evaluate`, mistakes, and dry runs as typed."""

import json
import shlex
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import typer.main
from support.pipelines import typed

from dskd.cli import app
from dskd.config.cluster import ClusterConfig, ContainerConfig
from dskd.config.errors import UserError
from dskd.config.load import parse_yaml
from dskd.config.pipeline import StageConfig
from dskd.config.suites import SUITES
from dskd.config.training import GenerationConfig
from dskd.launch.pipeline import read_pipeline
from dskd.launch.request import evaluation_options
from dskd.rundir.content import sum_of
from dskd.rundir.layout import RunDirectory
from dskd.rundir.shard import ShardProgress, settings_sum, write_shard

HERE = ClusterConfig()


def everything_in(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.name != "pipeline.yaml"}


# What a stage asks of `dskd evaluate`


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        ({}, {"precision": "bf16", "temperature": 1.0, "greedy": False, "bos": False, "processes": None}),
        ({"precision": "fp32", "bos": True, "processes": 3}, {"precision": "fp32", "bos": True, "processes": 3}),
        ({"generation": GenerationConfig(greedy=True, batch_size=5)}, {"greedy": True, "batch_size": 5}),
        ({"generation": GenerationConfig(False, 1e-5, 0.25, 64, 32)}, {"temperature": 1e-5, "top_p": 0.25}),
        ({"generation": GenerationConfig(False, 1.0, 1.0, 64, 32)}, {"max_length": 64, "max_prompt_length": 32}),
    ],
)
def test_the_command_line_of_an_evaluation_says_what_its_stage_says(stage, expected):
    """Read back by the command line's own parser."""
    options = evaluation_options(StageConfig(evaluate="x", data=("y",), **stage))
    verb = typer.main.get_command(app).commands["evaluate"]
    found = verb.make_context("evaluate", ["MODEL", "--data", "FILE", *options]).params
    assert {name: found[name] for name in expected} == expected


def test_each_setting_of_an_evaluation_is_said_even_where_it_is_the_default():
    options = evaluation_options(StageConfig(evaluate="x", data=("y",)))
    said = {option.partition("=")[0].removeprefix("--").replace("-", "_") for option in options}
    assert said == {field.name for field in fields(GenerationConfig)} - {"greedy"} | {"precision"}


def test_an_evaluation_on_several_processes_gets_as_many_tasks(folder, write):
    stages = {
        "student": {"run": "run.yaml"},
        "scores": {"evaluate": "student", "data": [f"{folder}/dev.jsonl"], "seeds": [1], "processes": 2},
    }
    _, scores = read_pipeline(write(stages), ClusterConfig(gpus_per_node=2))
    assert [request.tasks_per_node for request in scores.requests] == [2]
    with pytest.raises(UserError, match=r"^processes: 2 is more than the 1 GPUs of a node"):
        read_pipeline(write(stages), ClusterConfig(gpus_per_node=1))


def test_a_suite_is_evaluated_set_by_set(folder, write, tmp_path):
    for file in SUITES["paper"].values():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    evaluation = {"evaluate": "student", "suite": "paper", "data_root": str(tmp_path), "seeds": [1, 2]}
    student, scores = read_pipeline(write({"student": {"run": "run.yaml"}, "scores": evaluation}), HERE)
    evaluations = student.run.directory / "eval"
    expected = [evaluations / name / f"seed{seed}" for name in SUITES["paper"] for seed in (1, 2)]
    assert [request.directory for request in scores.requests] == expected
    for changed, problem in (
        ({"suite": "papers"}, "unknown suite; allowed: paper; nearest: paper"),
        ({"data_root": None}, "data_root: suite and data_root are expected together"),
        ({"data_root": str(tmp_path / "none")}, f"data: no such file: {tmp_path}/none/dolly/valid.jsonl"),
    ):
        with pytest.raises(UserError, match=problem):
            read_pipeline(write({"student": {"run": "run.yaml"}, "scores": evaluation | changed}), HERE)


# Models of other stages


def containers(**keys: object) -> ClusterConfig:
    return ClusterConfig(container=ContainerConfig("docker", "image"), **keys)


def test_the_evaluation_of_an_adapter_that_is_not_trained_yet_sees_its_base_model(folder, write, tiny):
    stages = {
        "first": {"run": "run.yaml"},
        "second": {"run": "run.yaml", "student": "first", "settings": ["student.lora.rank=2"]},
        "scores": {"evaluate": "second", "data": [f"{folder}/dev.jsonl"], "seeds": [1]},
    }
    first, second, scores = read_pipeline(write(stages), containers())
    base = f"type=bind,source={first.best},target={first.best},readonly"
    assert f"--mount={base}" in scores.requests[0].command
    stages["second"]["settings"] = []
    scores = read_pipeline(write(stages), containers())[-1]
    assert f"--mount={base}" not in scores.requests[0].command
    assert f"--mount={base.replace(str(first.best), str(second.best))}" in scores.requests[0].command


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_an_adapter_is_no_model_that_another_stage_can_take(write, role):
    stages = {"a": {"run": "run.yaml", "settings": ["student.lora={}"]}, "b": {"run": "run.yaml", role: "a"}}
    with pytest.raises(UserError, match=rf"stages\.b\.{role}: a trains a LoRA adapter, and a whole model is expected"):
        read_pipeline(write(stages), HERE)


@pytest.mark.parametrize("name", ["10", "true", "a: b", "[x]", "ü😀", "a #b"])
def test_any_name_of_a_stage_is_the_name_of_its_run(write, name):
    train, distil = read_pipeline(
        write({name: {"run": "run.yaml"}, "next": {"run": "run.yaml", "student": name}}), HERE
    )
    assert train.requests[0].directory.name == name
    assert distil.run.student.path == train.best


def test_two_jobs_that_would_write_to_one_folder_are_told(folder, write, tmp_path):
    (tmp_path / "dev.jsonl").touch()
    train = {"run": "run.yaml"}
    evaluation = {"evaluate": "a", "data": [f"{folder}/dev.jsonl"]}
    twins = {"evaluate": "a", "data": [f"{folder}/dev.jsonl", f"{tmp_path}/dev.jsonl"]}
    for stages, both in (
        ({"a": train, "b": evaluation, "c": evaluation | {"generation": {"greedy": True}}}, "b and c"),
        ({"a": train, "b": twins}, "b"),
        ({"a": train, "b": train | {"settings": ["output.name=a"]}}, "a and b"),
    ):
        with pytest.raises(UserError, match=f"pipeline.yaml: stages: two jobs of {both} would write to "):
            read_pipeline(write(stages), HERE)


# Students, several seeds, a report


def test_a_made_student_is_trained_with_several_seeds_evaluated_at_once_and_reported(folder, write, tiny, tmp_path):
    made, model = tmp_path / "made", tiny("llama")
    stages = {
        "made": {"make": {"model": str(model), "out": str(made), "layers": 2, "tokens": 512}},
        "distil": {"run": "run.yaml", "student": "made", "train_seeds": [3, 4], "settings": ["train.max_steps=2"]},
        "scores": {"evaluate": "distil", "data": [f"{folder}/dev.jsonl"], "seeds": [1, 2], "together": True},
        "page": {"report": str(tmp_path / "report.html")},
    }
    student, distil, scores, page = read_pipeline(write(stages), HERE)
    (make,) = student.requests
    verb = typer.main.get_command(app).commands["student"]
    found = verb.make_context("student", list(make.command[make.command.index("student") + 1 :])).params
    assert (found["model"], found["folder"]) == (model, made)
    assert (found["layers"], found["tokens"], found["width"]) == (2, 512, None)
    directories = [request.directory for request in distil.requests]
    assert directories == [folder / f"outputs/made/sft/distil-seed{seed}" for seed in (3, 4)]
    assert [parse_yaml(request.settings)["train"]["seed"] for request in distil.requests] == [3, 4]
    assert distil.run.student.path == made
    assert [request.directory for request in scores.requests] == [run / "eval" / "dev" for run in directories]
    assert all("1,2" in request.command for request in scores.requests)
    assert page.needs == ("distil", "scores")
    assert page.requests[0].command[3:] == ("report", *map(str, directories), f"--out={tmp_path}/report.html")
    made.mkdir()
    assert student.open == ()
    assert page.open


def test_settings_of_a_pipeline_go_over_run_files_and_under_those_of_a_stage(folder, tmp_path):
    file = folder / "settings.yaml"
    stages = {"a": {"run": "run.yaml"}, "b": {"run": "run.yaml", "settings": ["train.epochs=9"]}}
    file.write_text(json.dumps({"settings": ["train.epochs=7", "train.lr=0.5"], "stages": stages}))
    found = [(stage.run.train.epochs, stage.run.train.lr) for stage in read_pipeline(file, HERE)]
    assert found == [(7, 0.5), (9, 0.5)]


# Dry runs


def test_a_dry_run_shows_each_stage_with_what_it_waits_for_and_one_script_and_writes_nothing(folder, write):
    before = everything_in(folder)
    stages = {
        "student": {"run": "run.yaml", "settings": ["train.max_steps=2"]},
        "scores": {"evaluate": "student", "data": [f"{folder}/dev.jsonl"], "seeds": [1, 2], "parallel": 1},
    }
    done = typed(write(stages), "--cluster", "local", "--dry-run")
    assert (done.returncode, done.stderr) == (0, "")
    outputs = f"{folder}/outputs/llama-pieces-untied/sft/student"
    assert done.stdout.count("#!/bin/bash\n") == 2
    student, scores = done.stdout.split("# stage scores: ")
    assert student.startswith(f"# stage student: 1 job\n# {outputs}: each rank runs\n")
    assert "--dependency" not in student
    assert scores.startswith("2 jobs, after student\n")
    assert "#SBATCH --dependency=afterok:student\n" in scores
    assert "#SBATCH --array=0-1%1\n" in scores
    for seed in (1, 2):
        assert f"# {outputs}/eval/dev/seed{seed}: each rank runs\n" in scores
        assert f" evaluate {outputs}/best --data {folder}/dev.jsonl --seeds {seed} " in scores
    assert everything_in(folder) == before


def test_a_dry_run_leaves_out_what_is_complete(folder, write):
    stages = {
        "done": {"run": "run.yaml"},
        "scores": {"evaluate": "done", "data": [f"{folder}/dev.jsonl"], "seeds": [1, 2]},
    }
    train, scores = read_pipeline(write(stages), HERE)
    state = train.requests[0].directory / "resume" / "step5"
    state.mkdir(parents=True)
    about = {"format": 1, "world_size": 1, "step": 5, "finished": True}
    (state / "state.json").write_text(json.dumps(about))
    (state.parent / "LATEST").write_text("step5\n")
    results = scores.requests[0].directory
    results.mkdir(parents=True)
    (results / "results.json").write_text('{"rougel": {"mean": 1.0}}')
    done = typed(write(stages), "--cluster", "local", "--dry-run")
    trained, evaluated, directory = done.stdout.splitlines()[:3]
    assert trained == "# stage done: 1 of 1 complete already"
    assert evaluated == "# stage scores: 1 job, 1 of 2 complete already"
    assert directory == f"# {results.parent}/seed2: each rank runs"
    assert "--dependency" not in done.stdout


def test_a_cache_is_an_array_of_shards_that_the_distillation_waits_for(write, make_run, tmp_path):
    file = make_run(tmp_path)
    stages = {
        "sft": {"run": "run.yaml"},
        "states": {"cache": str(file), "shards": 3, "teacher": "sft", "parallel": 2},
        "distil": {"run": str(file), "teacher": "sft", "settings": ["teacher.backend=cache"], "after": ["states"]},
    }
    done = typed(write(stages), "--cluster", "local", "--dry-run")
    assert (done.returncode, done.stderr) == (0, "")
    _, states, distil = done.stdout.split("\n# stage ")
    assert states.startswith("states: 3 jobs, after sft\n")
    assert "#SBATCH --array=0-2%2\n" in states
    for shard in range(3):
        directory = f"{tmp_path}/outputs/llama-pieces-untied/dskd_cma/states/shard{shard}-of-3"
        assert f"# {directory}: each rank runs\n" in states
        assert f" teacher cache {directory}/job/run.yaml --shard {shard}/3 --output {directory}\n" in states
    assert distil.startswith("distil: 1 job, after sft, states\n")


def test_a_shard_of_a_cache_is_complete_as_long_as_run_file_records_and_folder_are_the_same(write, make_run, tmp_path):
    file = make_run(tmp_path)
    stages = {"states": {"cache": str(file), "shards": 2}}
    ((first, second),) = (stage.requests for stage in read_pipeline(write(stages), HERE))

    def open_shards(**changes: object) -> list[Path]:
        stages["states"].update(changes)
        return [request.directory for stage in read_pipeline(write(stages), HERE) for request in stage.open]

    records, cache = tmp_path / "train.jsonl", tmp_path / "cache"
    cache.mkdir()
    for request, made in ((first, 20), (second, 19)):
        request.directory.mkdir(parents=True)
        about = ShardProgress(cache, records, sum_of(records), settings_sum(request.settings), 20, made)
        write_shard(RunDirectory(request.directory), about)
    both = [first.directory, second.directory]
    assert open_shards() == [second.directory]
    assert open_shards(settings=["data.max_length=60"]) == both
    assert open_shards(settings=[]) == [second.directory]
    (first.directory / "shard.json").write_text("{")
    assert open_shards() == both
    write_shard(RunDirectory(first.directory), replace(about, made=20))
    assert open_shards() == [second.directory]
    records.write_text(records.read_text() * 2)
    assert open_shards() == both
    write_shard(RunDirectory(first.directory), replace(about, made=20, content=sum_of(records)))
    assert open_shards() == [second.directory]
    cache.rmdir()
    assert open_shards() == both


def test_a_dry_run_here_shows_the_commands_that_would_run(folder, write):
    before = everything_in(folder)
    evaluation = {"precision": "fp32", "generation": {"greedy": True, "max_length": 64, "max_prompt_length": 32}}
    stages = {
        "taught": {"run": "run.yaml"},
        "scores": {"evaluate": "taught", "data": [f"{folder}/dev.jsonl"], "seeds": [3], **evaluation},
    }
    done = typed(write(stages), "--local", "--dry-run")
    assert (done.returncode, done.stderr) == (0, "")
    outputs = f"{folder}/outputs/llama-pieces-untied/sft/taught"
    train, command, scores, evaluate = done.stdout.splitlines()
    assert train == f"# stage taught: {outputs}"
    assert shlex.split(command) == [sys.executable, "-m", "dskd", "train", f"{outputs}/job/run.yaml"]
    assert scores == f"# stage scores: {outputs}/eval/dev/seed3"
    words = shlex.split(evaluate)
    assert words[:5] == [sys.executable, "-m", "dskd", "evaluate", f"{outputs}/best"]
    assert {"--greedy", "--precision=fp32", "--max-length=64", "--max-prompt-length=32"} <= set(words)
    assert everything_in(folder) == before


def test_a_wrong_setting_is_told_before_anything_is_submitted(folder, write):
    stages = {
        "student": {"run": "run.yaml"},
        "scores": {"evaluate": "student", "data": [f"{folder}/dev.jsonl"], "generation": {"tempratur": 2}},
    }
    for how in (["--local"], ["--cluster", "local"], ["--cluster", "local", "--dry-run"]):
        done = typed(write(stages), *how)
        assert (done.returncode, done.stdout) == (2, "")
        (line,) = done.stderr.splitlines()
        assert "stages.scores.generation.tempratur: unknown key; allowed: " in line
        assert line.endswith("nearest: temperature")
