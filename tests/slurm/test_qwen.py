"""The pipeline in jobs/qwen at small size, with made-up models of the same families, on a real cluster."""

import json
import shutil
from pathlib import Path

import pytest
from ruamel.yaml import YAML
from support.cluster import dskd, rank_environments, steps, wait_for, wait_until
from support.tiny import varied_records, write_records

from dskd.config.recipes import recipes_folder
from dskd.rundir.jobs import Jobs

YAML_FILES = YAML(typ="safe", pure=True)
SHARDS = 4
TRAININGS = ("dskd", "dskd_v2", "dskd_sharded")
METHODS = {"dskd": "dskd", "dskd_v2": "dskd_v2", "dskd_sharded": "dskd"}


@pytest.fixture(scope="module")
def pipeline(tiny, tmp_path_factory) -> Path:
    """A copy of jobs/qwen that says in its base where models and records are, and that all are small."""
    root = tmp_path_factory.mktemp("qwen")
    folder = shutil.copytree(recipes_folder() / "qwen", root / "qwen")
    write_records(root / "train.jsonl", varied_records(48))
    write_records(root / "test.jsonl", varied_records(6, start=100))
    change(
        folder / "_base.yaml",
        {
            "student": {"path": str(tiny("qwen2"))},
            "teacher": {"path": str(tiny("qwen2", hidden_size=48, vocab_size=480))},
            "data": {
                "train": f"{root}/train.jsonl",
                "dev": f"{root}/test.jsonl",
                "max_length": 64,
                "max_prompt_length": 32,
            },
            "train": {"epochs": 1, "global_batch_size": 16},
            "eval": {"generation": {"max_length": 64, "max_prompt_length": 32}},
            "engine": {"precision": "fp32"},
            "output": {"root": f"{root}/outputs"},
        },
    )
    small = {
        "data": [f"{root}/test.jsonl"],
        "seeds": [10],
        "precision": "fp32",
        "generation": {"max_length": 64, "max_prompt_length": 32},
    }
    change(folder / "pipeline.yaml", {"stages": {f"scores_{name}": small for name in TRAININGS}})
    return folder / "pipeline.yaml"


def change(file: Path, changes: dict[str, dict[str, object]]) -> None:
    """Lay `changes` over a YAML file, two levels deep."""
    values = YAML_FILES.load(file)
    for section, keys in changes.items():
        for key, value in keys.items():
            below = values.setdefault(section, {})
            merged = isinstance(value, dict) and isinstance(below.get(key), dict)
            below[key] = below[key] | value if merged else value
    YAML_FILES.dump(values, file)


def test_the_teacher_runs_once_as_an_array_students_learn_from_it_and_are_scored(slurm, profile, pipeline):
    dskd("pipeline", pipeline, "--cluster", profile())
    (outputs,) = (pipeline.parents[1] / "outputs").glob("qwen2*")
    runs = {name: outputs / METHODS[name] / name for name in TRAININGS}
    shards = [outputs / f"dskd/states/shard{shard}-of-{SHARDS}" for shard in range(SHARDS)]

    wait_until(lambda: len(rank_environments(runs["dskd_sharded"])) == 4, 120)
    ranks = rank_environments(runs["dskd_sharded"])
    assert [rank["LOCAL_RANK"] for rank in ranks] == ["0", "1", "0", "1"]
    assert len({rank["SLURMD_NODENAME"] for rank in ranks}) == 2

    made = [wait_for(shard, "finished").shard for shard in shards]
    assert len({Jobs.at(shard).read().id.partition("_")[0] for shard in shards}) == 1
    assert sum(shard.made for shard in made) == 48
    assert f"\n  {made[0].made} of {made[0].made} records" in dskd("status", shards[0])

    for directory in runs.values():
        assert wait_for(directory, "finished").step == 3
        assert steps(directory) == [1, 2, 3]
        scores = directory / "eval/test/seed10"
        wait_for(scores, "finished")
        assert json.loads((scores / "results.json").read_text())["records"] == 6
    began = Jobs.at(runs["dskd"]).starts()[0].time
    assert all(began >= Jobs.at(shard).starts()[0].ended for shard in shards)

    again = dskd("pipeline", pipeline, "--cluster", profile())
    assert " job" not in again
    assert "states: 4 of 4 complete already\n" in again
    done = dskd("pipeline", pipeline, "--local")
    assert {line.partition(": ")[2] for line in done.splitlines()} == {"complete"}
    assert "goes on with it" in dskd("resume", shards[0], code=2)
