"""Tasks of lm-eval, EleutherAI's evaluation harness, where it is installed: their results lie beside the others."""

import re
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from dskd.config.errors import UserError, shown
from dskd.evaluation.kept import identity_of
from dskd.evaluation.scores import over_seeds
from dskd.models.load import load_checkpoint, load_tokenizer, loading
from dskd.rundir.content import model_content
from dskd.rundir.files import as_user_error, read_json, write_json
from dskd.rundir.layout import RESULTS, evaluation_of

PREFIX = "lm-eval:"
"""Of such a suite: lm-eval:TASK,TASK."""


TaskResults = dict[str, dict[str, Any]]
"""What results.json holds, by task."""


def parse_tasks(suite: str) -> list[str]:
    """From "lm-eval:TASK,TASK". Raises `UserError` for what cannot be the name of a task, nor of a folder."""
    tasks = suite.removeprefix(PREFIX).split(",")
    for task in tasks:
        if re.fullmatch(r"\w[\w.-]*", task, re.ASCII) is None:
            raise UserError(f"--suite: {PREFIX}TASK,TASK is expected, got {shown(suite)}")
    return tasks


def import_harness() -> Any:
    """lm-eval's modules. Raises `UserError` where it is not installed."""
    try:
        return import_module("lm_eval"), import_module("lm_eval.models.huggingface")
    except ImportError as error:
        raise UserError(f"--suite {PREFIX}...: lm-eval is not there ({error.name}); pip install lm-eval") from None


def evaluate_tasks(
    checkpoint: Path, tasks: Sequence[str], precision: str, batch_size: int
) -> dict[str, dict[str, Any]]:
    """What lm-eval finds on each task, in MODEL/eval/lm-eval/TASK/results.json; what is there is not done again."""
    harness, models = import_harness()
    folders = {task: evaluation_of(checkpoint, f"lm-eval/{task}") for task in tasks}
    about = {"model": model_content(checkpoint).files, "precision": precision, "lm_eval": harness.__version__}
    identities = {task: identity_of(about | {"task": task}) for task in tasks}
    results = {task: read_json(folder / RESULTS) or {} for task, folder in folders.items()}
    missing = [task for task in tasks if results[task].get("identity") != identities[task]]
    if missing:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        tokenizer = load_tokenizer(checkpoint, str(checkpoint))
        model = load_checkpoint(checkpoint, precision, device)
        with loading(f"--suite {PREFIX}{','.join(missing)}"):
            asked = models.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
            found = harness.simple_evaluate(model=asked, tasks=missing, bootstrap_iters=0, log_samples=False)
            told = {task: metrics_of(found["results"][task]) for task in missing}
            records = {task: int(found["n-samples"][task]["effective"]) for task in missing}
    for task in missing:
        own = {"checkpoint": str(checkpoint), "data": f"{PREFIX}{task}", "records": records[task], "seeds": [0]}
        results[task] = own | {"precision": precision, "identity": identities[task], **told[task]}
        with as_user_error(folders[task], "--suite"):
            folders[task].mkdir(parents=True, exist_ok=True)
            write_json(folders[task] / RESULTS, results[task])
    return results


def metrics_of(result: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Metrics by name, as lm-eval scales them: "acc,none" is acc, and another filter than none stays in the name."""
    numbers = {name.removesuffix(",none"): value for name, value in result.items() if isinstance(value, (int, float))}
    return {name: over_seeds([float(value)]) for name, value in numbers.items() if is_metric(name)}


def is_metric(name: str) -> bool:
    return "_stderr" not in name and not name.startswith(("alias", "sample_len", "sample_count"))
