"""How near a student came to its teacher: the structure of their hidden states, and their distributions.

A sample's structure is how like its tokens' last hidden states are to each other: a matrix [N, N] for N response
tokens, which can be compared between models of different widths. Two forms of it, and the distances between the
teacher's and the student's (arXiv 2406.17328, its analysis of representations):

- cosine: cosines of all pairs; the mean absolute difference.
- inner product: inner products of all pairs, each row divided by its sum; the L1 distance of rows, mean over them.

With two vocabularies both are over exactly aligned tokens. With one, the mean forward KL and JS divergence of the next
token's distributions over the sample's tokens come beside.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, quantiles

import torch
from torch import Tensor

from dskd.config.errors import UserError
from dskd.config.hub import find_model
from dskd.config.models import TeacherConfig
from dskd.config.run import check_checkpoint, check_length, check_model_folder
from dskd.data.alignment import aligner
from dskd.data.batch import Batch
from dskd.data.loader import Collator
from dskd.data.sources import check_source, read_source
from dskd.data.tokenization import Limits, check_tokenizer
from dskd.losses.distances import Tempered
from dskd.losses.streaming import StreamedLogits
from dskd.models.load import load_checkpoint, load_tokenizer
from dskd.models.views import ModelView, check_view, check_vocabulary
from dskd.rundir.analysis import Analysis, Compared, Spread
from dskd.rundir.layout import RunDirectory
from dskd.rundir.read import model_of, read_run
from dskd.teachers.resident import load_resident

CHUNK = 64
"""Tokens whose logits are there at a time."""
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Task:
    """Which models are compared, on which records."""

    teacher: TeacherConfig
    after: Path
    before: Path | None
    data: Path
    limits: Limits
    records: int
    """The first so many."""


def task_of(
    place: Path, teacher: Path | None, data: Path | None, lengths: tuple[int, int] | None, records: int
) -> Task:
    """What is compared for a run directory or a model; what is given goes over what a run says.

    Args:
        lengths: tokens of prompt and response together, and of the prompt.

    Raises:
        UserError: where a model or file is missing, or a model has fewer positions.
    """
    run = read_run(place) if RunDirectory(place).settings.is_file() else None
    given = TeacherConfig(find_model(teacher)) if teacher is not None else None if run is None else run.teacher
    file = data or (None if run is None else run.data.dev)
    if given is None:
        raise UserError(f"--teacher: {place} names no teacher, so a model is expected")
    if file is None:
        raise UserError(f"--data: {place} is a model and no run, so a file of records is expected")
    usual = (512, 256) if run is None else (run.data.max_length, run.data.max_prompt_length)
    limits = Limits(*(lengths or usual), bos=run is not None and run.data.bos)
    task = Task(given, model_of(place), None if run is None else run.student.path, file, limits, records)
    check(task)
    return task


def check(task: Task) -> None:
    """Raise `UserError` for what can be told before a model is loaded."""
    check_source(task.data)
    check_model_folder("teacher.path", task.teacher.path)
    for key, model in (("MODEL", task.after), ("student.path", task.before), ("teacher.path", task.teacher.path)):
        if model is not None:
            check_checkpoint(model)
            check_length(f"{key}: --max-length", task.limits.max_length, model)


@torch.no_grad()
def analyze(task: Task, precision: str, device: torch.device, progress: Progress) -> Analysis:
    """Compare both students with the teacher.

    Raises:
        UserError: where a model or the records do not load, or no record has two tokens to be compared.
    """
    student_tokenizer = load_tokenizer(task.after, str(task.after))
    teacher_tokenizer = load_tokenizer(task.teacher.path, "teacher.path", task.teacher.trust_remote_code)
    for key, tokenizer in ((str(task.after), student_tokenizer), ("teacher.path", teacher_tokenizer)):
        check_tokenizer(tokenizer, task.limits, key)
    aligned = student_tokenizer.get_vocab() != teacher_tokenizer.get_vocab()
    records = read_source(task.data, lambda: student_tokenizer)[: task.records]
    align = aligner("exact", teacher_tokenizer, student_tokenizer) if aligned else None
    collate = Collator(records, student_tokenizer, teacher_tokenizer if aligned else None, task.limits, align)
    teacher = load_resident(task.teacher, teacher_tokenizer, precision, device).view
    paths = {name: path for name, path in (("before", task.before), ("after", task.after)) if path is not None}
    students = {name: load_view(path, student_tokenizer, precision, device) for name, path in paths.items()}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in students}
    tokens = 0
    for index in range(len(records)):
        progress(index, len(records))
        batch = collate([index]).to(device)
        target, rows = states_of(teacher, batch, "teacher"), shared_rows(batch)
        if len(rows[0]) > 1:
            tokens += len(rows[0])
            for name, student in students.items():
                own = states_of(student, batch, "student")
                measured = structure_distances(own[rows[0]], target[rows[1]])
                found[name].append(measured | ({} if aligned else divergences(student, own, teacher, target)))
    if not tokens:
        raise UserError(f"{task.data}: none of its first {len(records)} records has two tokens that can be compared")
    compared = {name: summary(str(paths[name]), each) for name, each in found.items()}
    return Analysis(
        teacher=str(task.teacher.path),
        data=str(task.data),
        records=len(found["after"]),
        tokens=tokens,
        aligned=aligned,
        after=compared["after"],
        before=compared.get("before"),
    )


def best_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_view(path: Path, tokenizer: object, precision: str, device: torch.device) -> ModelView:
    view = ModelView(load_checkpoint(path, precision, device), str(path))
    check_vocabulary(view, tokenizer)
    check_view(view)
    return view


def states_of(view: ModelView, batch: Batch, side: str) -> Tensor:
    """Last hidden states [N, D] of the response tokens of one sample."""
    return view.body.states(batch.teacher if side == "teacher" else batch.student)


def shared_rows(batch: Batch) -> tuple[Tensor, Tensor]:
    """Which of the student's and of the teacher's response tokens are compared: all, or those that are aligned."""
    if batch.pairs is None:
        every = torch.arange(len(batch.student.labels), device=batch.student.labels.device)
        return every, every
    return batch.pairs[:, 1], batch.pairs[:, 0]


def structure_distances(student: Tensor, teacher: Tensor) -> dict[str, float]:
    """Distances between the structures of the same tokens' states [N, D] and [N, E]."""
    cosine = cosines(student.float()) - cosines(teacher.float())
    inner = row_shares(student.float()) - row_shares(teacher.float())
    return {"cosine": float(cosine.abs().mean()), "inner_product": float(inner.abs().sum(-1).mean())}


def cosines(states: Tensor) -> Tensor:
    """[N, N]"""
    unit = torch.nn.functional.normalize(states, dim=-1)
    return unit @ unit.T


def row_shares(states: Tensor) -> Tensor:
    """Inner products [N, N], each row divided by its sum."""
    products = states @ states.T
    return products / products.sum(-1, keepdim=True)


def divergences(student: ModelView, own: Tensor, teacher: ModelView, target: Tensor) -> dict[str, float]:
    """Mean forward KL and JS divergence over the tokens of states [N, D] and [N, E], at temperature 1, in nats."""
    streams = StreamedLogits(own, student.ends.head()), StreamedLogits(target, teacher.ends.head())
    sums = {"forward_kl": 0.0, "js_divergence": 0.0}
    for first in range(0, len(own), CHUNK):
        rows = slice(first, first + CHUNK)
        for name, distance in KINDS.items():
            sums[name] += float(distance(*(each.logits(rows) for each in streams))[0].double().sum())
    return {name: value / len(own) for name, value in sums.items()}


KINDS = {"forward_kl": Tempered("forward_kl", 1.0), "js_divergence": Tempered("js_divergence", 1.0)}


def summary(model: str, samples: list[dict[str, float]]) -> Compared:
    by_name = {name: spread([each[name] for each in samples]) for name in samples[0]}
    kl, js = by_name.get("forward_kl"), by_name.get("js_divergence")
    return Compared(model, by_name["cosine"], by_name["inner_product"], kl, js)


def spread(values: list[float]) -> Spread:
    low, middle, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return Spread(fmean(values), low, middle, high)
