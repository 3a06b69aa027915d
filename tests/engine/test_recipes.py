"""Every recipe of jobs/, made small, trains: the same run file on tiny models of the same families, three steps each.

Teachers come from their own recipe: the model or adapter that its run saves is what the others are given.
"""

import json
import math
from pathlib import Path

import pytest
from support.tiny import varied_records, write_records

from dskd.config.load import load_run
from dskd.config.recipes import find_recipes
from dskd.train import train

RECIPES = {"/".join(r.file.with_suffix("").parts[-2:]): r.file.absolute() for r in find_recipes()}
TRAINED = [name for name in RECIPES if not name.startswith("quickstart/")]
STEPS = 3
# Model: family, tokenizer, hidden size. The students' own tokenizer is "pieces".
MODELS = {
    "gpt2-base": ("gpt2", "pieces", 32),
    "gpt2-xl-sft": ("gpt2", "pieces", 64),
    "qwen1.5-1.8b": ("qwen2", "bytes", 64),
    "tinyllama-1.1b": ("llama", "pieces", 32),
    "llama2-7b": ("llama", "pieces", 64),
    "mistral-7b": ("mistral", "bytes", 64),
    "qwen2.5-1.5b": ("qwen2", "bytes", 32),
    "qwen2.5-72b": ("qwen2", "bytes", 64),
    "gpt2-xl": ("gpt2", "pieces", 32),
}
# Trained teacher: the recipe that saves it.
TEACHERS = {
    "qwen1.5-1.8b-sft": "gpt2/sft_qwen",
    "llama2-7b-sft-lora": "tinyllama/sft_llama2",
    "mistral-7b-sft-lora": "tinyllama/sft_mistral",
}


class Small:
    """Runs of recipes in this process, each once in the session of tests."""

    def __init__(self, tiny, ranks, root: Path) -> None:
        self.tiny, self.ranks, self.root = tiny, ranks, root
        self.train = write_records(root / "train.jsonl", varied_records(STEPS * 64))
        self.dev = write_records(root / "dev.jsonl", varied_records(4, start=500))
        self.done: dict[str, Path] = {}

    def run(self, name: str) -> Path:
        """The run directory of a recipe."""
        if name not in self.done:
            self.done[name] = train(load_run(RECIPES[name], self.overrides(name)), self.ranks)
        return self.done[name]

    def overrides(self, name: str) -> list[str]:
        run = load_run(RECIPES[name])
        changed = {"student.path": self.stand_in(run.student.path), "output.root": self.root / name}
        changed |= {"data.train": self.train, "data.dev": self.dev, "data.workers": 0}
        for section in ("data", "eval.generation"):
            changed |= {f"{section}.max_length": 64, f"{section}.max_prompt_length": 32}
        changed |= {"train.max_steps": STEPS, "engine.precision": "fp32"}
        if run.student.lora:
            changed["student.lora.rank"] = 4
        if run.teacher:
            changed["teacher.path"] = self.stand_in(run.teacher.path)
            changed["teacher.backend"] = "resident"  # small, it fits
        if run.teacher and run.teacher.adapter:
            changed["teacher.adapter"] = self.stand_in(run.teacher.adapter)
        return [f"{key}={value}" for key, value in changed.items()]

    def stand_in(self, path: Path) -> Path:
        """A tiny model, or what the teacher's own recipe saved, for a folder that a recipe names."""
        if path.name in TEACHERS:
            return self.saved(TEACHERS[path.name])
        family, tokenizer, hidden = MODELS[path.name]
        return self.tiny(family, tokenizer, **{"n_embd" if family == "gpt2" else "hidden_size": hidden})

    def saved(self, name: str) -> Path:
        """The one model that a recipe's run leaves."""
        (folder,) = self.run(name).glob("epoch*")
        return folder


@pytest.fixture(scope="module")
def small(tiny, ranks, tmp_path_factory) -> Small:
    return Small(tiny, ranks, tmp_path_factory.mktemp("recipes"))


@pytest.mark.parametrize("name", TRAINED)
def test_three_steps_of_each_recipe(name, small):
    directory = small.run(name)
    *steps, evaluation = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    run = load_run(directory / "run.yaml")
    assert [step["step"] for step in steps] == [1, 2, 3]
    assert all(math.isfinite(value) for step in steps for value in step.values())
    assert all(step["loss"] > 0 and step["grad_norm"] > 0 for step in steps)
    assert steps[0]["lr"] == run.train.lr
    assert any(key.endswith("kd") for key in steps[0]) is (run.teacher is not None)
    assert all(step.get("aligned_tokens", 1) > 0 for step in steps)
    # The saved model is named by what makes it the best.
    assert f"rougel{evaluation['dev_rougel']:.4f}" in small.saved(name).name
    assert (small.saved(name) / "adapter_model.safetensors").is_file() is (run.student.lora is not None)
