"""The run files in jobs/: one for each training script of the original, with the published settings."""

import json
from dataclasses import fields
from fnmatch import fnmatch
from functools import reduce
from pathlib import Path

import pytest
from support.published import GPT2_XL, QWEN_1_5B, QWEN_72B, TINYLLAMA

from dskd.config.load import load, load_run, override, read_yaml
from dskd.config.methods import MethodConfig
from dskd.config.models import LoraConfig
from dskd.config.pipeline import PipelineConfig
from dskd.config.recipes import find_recipes, recipes_folder
from dskd.config.run import RunConfig, accumulation_steps
from dskd.plan.advice import judge
from dskd.plan.machine import assumed_machine
from dskd.plan.models import read_models

CONFIGS = {
    "qwen2.5-72b": QWEN_72B,
    "qwen2.5-1.5b": QWEN_1_5B,
    "tinyllama-1.1b": TINYLLAMA,
    "gpt2-xl": GPT2_XL,
}
JOBS = recipes_folder()
PIPELINE = JOBS / "qwen/pipeline.yaml"
RUNS = [file for file in sorted(JOBS.rglob("[!_]*.yaml")) if "stages" not in read_yaml(file)]
NAMES = [str(file.relative_to(JOBS).with_suffix("")) for file in RUNS]
PAPER = [name for name in NAMES if not name.startswith(("quickstart/", "qwen/"))]
LARGE = [name for name in NAMES if name.startswith("qwen/")]

# Recipe: method, student, teacher. All that scripts/ of the original trains, and the two methods of its successor.
ORIGINAL = {
    "gpt2/sft_qwen": ("sft", "qwen1.5-1.8b", None),  # sft_teacher_qwen.sh
    "gpt2/sft": ("sft", "gpt2-base", None),  # sft_gpt2_base.sh
    "gpt2/kd": ("kd", "gpt2-base", "gpt2-xl-sft"),  # vanilla_kd_gpt2_base.sh
    "gpt2/dskd": ("dskd", "gpt2-base", "gpt2-xl-sft"),  # dskd_gpt2_base.sh
    "gpt2/mined": ("mined", "gpt2-base", "qwen1.5-1.8b-sft"),  # minedit_gpt2_base.sh
    "gpt2/uld": ("uld", "gpt2-base", "qwen1.5-1.8b-sft"),  # uld_gpt2_base.sh
    "gpt2/dskd_cma": ("dskd_cma", "gpt2-base", "qwen1.5-1.8b-sft"),  # dskd_cma_gpt2_base.sh
    "gpt2/dskd_v2": ("dskd_v2", "gpt2-base", "gpt2-xl-sft"),
    "gpt2/dskd_v2_eta": ("dskd_v2_eta", "gpt2-base", "qwen1.5-1.8b-sft"),
    "tinyllama/sft_llama2": ("sft", "llama2-7b", None),  # sft_teacher_llama2.sh
    "tinyllama/sft_mistral": ("sft", "mistral-7b", None),  # sft_teacher_mistral.sh
    "tinyllama/sft": ("sft", "tinyllama-1.1b", None),  # sft_tinyllama.sh
    "tinyllama/kd": ("kd", "tinyllama-1.1b", "llama2-7b"),  # vanilla_kd_tinyllama.sh
    "tinyllama/dskd": ("dskd", "tinyllama-1.1b", "llama2-7b"),  # dskd_tinyllama.sh
    "tinyllama/mined": ("mined", "tinyllama-1.1b", "mistral-7b"),  # minedit_tinyllama.sh
    "tinyllama/uld": ("uld", "tinyllama-1.1b", "mistral-7b"),  # uld_tinyllama.sh
    "tinyllama/dskd_cma": ("dskd_cma", "tinyllama-1.1b", "mistral-7b"),  # dskd_cma_tinyllama.sh
}

LLAMA_ADAPTER, MISTRAL_ADAPTER = Path("/models/llama2-7b-sft-lora"), Path("/models/mistral-7b-sft-lora")

# Published settings, by recipe; a later row goes over an earlier one.
PUBLISHED = [
    ("*", {"train.global_batch_size": 32, "train.seed": 10, "train.schedule": "cosine", "train.warmup_ratio": 0.0}),
    ("*", {"train.weight_decay": 1e-2, "train.clip": 1.0, "train.max_steps": None, "engine.precision": "bf16"}),
    ("*", {"data.max_length": 512, "data.max_prompt_length": 256, "data.bos": False}),
    ("*", {"eval.generate": True, "eval.every_epochs": 1, "checkpoint.best_by": "rougel", "checkpoint.keep_best": 1}),
    ("*", {"eval.generation.max_length": 512, "eval.generation.max_prompt_length": 256}),
    ("*", {"eval.generation.greedy": False, "eval.generation.temperature": 1.0, "eval.generation.top_p": 1.0}),
    ("gpt2/*", {"train.lr": 5e-4, "train.epochs": 20, "student.lora": None}),
    ("gpt2/sft_qwen", {"train.lr": 2e-5, "train.epochs": 10}),
    ("tinyllama/*", {"train.lr": 1e-3, "train.epochs": 10, "student.lora": LoraConfig(256, 8, 0.1)}),
    *((f"*/{kind}", {"method.kd_rate": 0.5}) for kind in MethodConfig.kinds if kind != "sft"),
    *((f"*/{kind}", {"method.temperature": 2.0}) for kind in ("kd", "mined")),
    *((f"*/{kind}", {"method.divergence": "forward_kl"}) for kind in ("kd", "mined")),
    ("*/dskd*", {"method.temperature": 2.0, "method.divergence": "forward_kl", "train.projector_lr": 1e-3}),
    ("*/dskd_v2*", {"train.global_batch_size": 64, "train.projector_lr": 5e-4}),
    ("*/dskd_v2*", {"method.projector_init": "pseudo_inverse", "method.agreement_mask": True}),
    *((f"tinyllama/{kind}", {"teacher.adapter": LLAMA_ADAPTER}) for kind in ("kd", "dskd")),
    *((f"tinyllama/{kind}", {"teacher.adapter": MISTRAL_ADAPTER}) for kind in ("mined", "uld", "dskd_cma")),
]


def run_of(name: str) -> RunConfig:
    return load_run(JOBS / f"{name}.yaml")


def test_each_training_script_of_the_original_has_its_recipe():
    runs = {name: run_of(name) for name in PAPER}
    told = {name: (r.method.kind, r.student.path.name, r.teacher and r.teacher.path.name) for name, r in runs.items()}
    assert told == ORIGINAL


@pytest.mark.parametrize("name", PAPER)
def test_the_published_settings(name):
    run = run_of(name)
    expected = {key: value for pattern, rows in PUBLISHED if fnmatch(name, pattern) for key, value in rows.items()}
    assert {key: reduce(getattr, key.split("."), run) for key in expected} == expected


@pytest.mark.parametrize("name", PAPER)
def test_the_global_batch_divides_on_one_machine(name):
    run = run_of(name)
    one, *more = [accumulation_steps(run, gpus) for gpus in (1, 2, 4, 8)]
    assert more == [one // 2, one // 4, one // 8]


@pytest.mark.parametrize("name", LARGE)
def test_a_teacher_of_72b_fits_on_the_nodes_that_its_recipe_asks_for(name, tmp_path):
    """Of 8 GPUs of 80 GB; the models' configurations alone are there."""
    run = run_of(name)
    assert run.teacher is not None
    assert run.teacher.path.name == "qwen2.5-72b"
    for folder, config in CONFIGS.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text(json.dumps(config))
    paths = (f"{side}.path={tmp_path / getattr(run, side).path.name}" for side in ("student", "teacher"))
    small = override(run, [*paths, f"data.train={tmp_path}/none", f"data.dev={tmp_path}/none"])
    found = judge(small, assumed_machine(small), read_models(small))
    assert found.asked.fits
    whole = next(forecast for forecast in found.forecasts if forecast.backend == "resident")
    assert not whole.fits


def test_the_pipeline_makes_the_states_that_its_trainings_read():
    stages = load(PIPELINE, PipelineConfig).stages
    runs = {
        name: load_run(PIPELINE.parent / (stage.cache or stage.run or ""))
        for name, stage in stages.items()
        if stage.evaluate is None
    }
    (maker,) = (name for name, stage in stages.items() if stage.cache)
    for name, stage in stages.items():
        if stage.run is not None:
            reads = runs[name].teacher.backend == "cache"
            assert stage.after == ((maker,) if reads else ())
            assert runs[name].teacher.path == runs[maker].teacher.path
    evaluated = {stage.evaluate for stage in stages.values() if stage.evaluate}
    assert evaluated == {name for name, stage in stages.items() if stage.run}


@pytest.mark.parametrize("file", sorted(JOBS.rglob("*.yaml")), ids=lambda file: file.stem)
def test_no_base_holds_a_method_setting_that_no_kind_knows(file):
    """A kind takes those of a base's method settings that it knows, so a slip there would go unseen."""
    known = {field.name for kind in MethodConfig.kinds.values() for field in fields(kind)}
    assert set(read_yaml(file).get("method", {})) <= known | {"kind"}


def test_what_a_listing_shows():
    recipes = find_recipes()
    for shown, name in zip(recipes, NAMES, strict=True):
        run = run_of(name)
        assert shown.file.resolve() == JOBS / f"{name}.yaml"
        assert (shown.method, shown.student) == (run.method.kind, run.student.path.name)
        assert shown.teacher == (run.teacher.path.name if run.teacher else "")
        assert shown.description == run.description
        assert 0 < len(shown.description) < 80
    assert len({(r.method, r.student, r.teacher, r.description) for r in recipes}) == len(NAMES)


def test_a_listing_shows_a_run_file_that_would_not_run(tmp_path):
    (tmp_path / "draft.yaml").write_text("student: 7\nmethod: {kind: 3}\n")
    (shown,) = find_recipes(tmp_path)
    assert (shown.file, shown.method, shown.student, shown.teacher) == (tmp_path / "draft.yaml", "3", "", "")
