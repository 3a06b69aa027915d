"""The public instruction sets of the paper -> records, each in the template of its code line. No torch, no numpy."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dskd.config.errors import UserError, shown
from dskd.data.records import Record, objects, opened, parse_object, told

TASK = "Below is an instruction that describes a task"
REQUEST = "Write a response that appropriately completes the request."
INSTANCES_OF_A_TASK = 100
"""Of each test task of Super-NaturalInstructions, as its own evaluation takes."""
Found = tuple[Record, str]
"""A record, and where it is from. An answer may be empty here."""


@dataclass(frozen=True)
class PublicSet:
    """How one public set is read, and what becomes of it."""

    origin: str
    licence: str
    read: Callable[[Path, Path | None], Iterator[Found]]
    """(source, references) -> its records, in their order."""
    expects: str
    """What the source is."""
    splits: bool = False
    """Whether it is split into train, dev and valid (the test records); else all are valid."""
    sample: int | None = None
    """Of so many records drawn at random the rest is made."""
    least_words: int = 0
    """Words that a record's first answer has at least."""


def fill_template(instruction: str, given: str) -> str:
    """The prompt for an instruction, and for what is given with it, which may be nothing."""
    if not given:
        return f"{TASK}. {REQUEST}\n\n### Instruction:\n{instruction}\n\n### Response:\n"
    context = f"{TASK}, paired with an input that provides further context. {REQUEST}"
    return f"{context}\n\n### Instruction:\n{instruction}\n\n### Input:\n{given}\n\n### Response:\n"


def read_dolly(source: Path, _: Path | None) -> Iterator[Found]:
    for where, value in objects(source):
        prompt = fill_template(text(value, "instruction", where), text(value, "context", where, missing=""))
        yield Record(prompt, (text(value, "response", where),)), where


def read_instances(source: Path, _: Path | None) -> Iterator[Found]:
    """Self-Instruct and Unnatural Instructions: an instruction with instances, each of which is a record."""
    for where, value in objects(source):
        instruction = text(value, "instruction", where)
        for instance in items(value, "instances", where):
            prompt = fill_template(instruction, text(instance, "input", where, missing=""))
            yield Record(prompt, (text(instance, "output", where),)), where


def read_vicuna(source: Path, references: Path | None) -> Iterator[Found]:
    """Questions in one file, answers in another, which belong together by `question_id`."""
    if references is None:
        raise UserError("--references: is needed for vicuna: the file of answers, jsonl")
    answers = {value.get("question_id"): (value, where) for where, value in objects(references)}
    for where, value in objects(source):
        key = value.get("question_id")
        if key not in answers:
            raise UserError(f"{where}: {references} has no answer to its question_id {shown(key)}")
        answer, there = answers[key]
        if "text" not in answer:
            answer = first_of(items(answer, "choices", there), "choices", there)
        yield Record(fill_template(first_turn(value, where), ""), (first_turn(answer, there),)), where


def read_sinst(source: Path, _: Path | None) -> Iterator[Found]:
    """The test tasks of a checkout of Super-NaturalInstructions (tasks/, splits/default/test_tasks.txt)."""
    listed = source / "splits" / "default" / "test_tasks.txt"
    with told(listed), opened(listed) as lines:
        names = lines.read().decode(errors="replace").split()
    for name in names:
        if Path(name).name != name:
            raise UserError(f"{listed}: names {shown(name)}, which is no task")
        file = source / "tasks" / f"{name}.json"
        with told(file), opened(file) as whole:
            task = parse_object(b" ".join(whole.read().splitlines()), str(file))
        definition = task.get("Definition")
        if isinstance(definition, list):
            task["Definition"] = first_of(definition, "Definition", str(file))
        instruction = text(task, "Definition", str(file))
        for number, instance in enumerate(items(task, "Instances", str(file))[:INSTANCES_OF_A_TASK]):
            where = f"{file}: instance {number}"
            outputs = instance.get("output")
            if not isinstance(outputs, list) or not all(isinstance(output, str) for output in outputs):
                raise UserError(f'{where}: "output" must be a list of texts')
            yield Record(fill_template(instruction, text(instance, "input", where)), tuple(outputs)), where


PUBLIC_SETS: Mapping[str, PublicSet] = {
    "dolly": PublicSet(
        "databricks-dolly-15k", "CC BY-SA 3.0", read_dolly, "a jsonl file with instruction, context, response", True
    ),
    "self-inst": PublicSet(
        "Self-Instruct, user-oriented instructions",
        "Apache-2.0",
        read_instances,
        "a jsonl file with instruction and instances",
    ),
    "vicuna": PublicSet(
        "Vicuna's 80 questions", "Apache-2.0", read_vicuna, "a jsonl file with question_id and text or turns"
    ),
    "sinst": PublicSet(
        "Super-NaturalInstructions, test tasks",
        "Apache-2.0",
        read_sinst,
        "a folder with tasks/ and splits/default/test_tasks.txt",
        least_words=11,
    ),
    "uinst": PublicSet(
        "Unnatural Instructions, core data",
        "MIT",
        read_instances,
        "a jsonl file with instruction and instances",
        sample=10_000,
        least_words=11,
    ),
}


def text(value: Mapping[str, Any], field: str, where: str, missing: str | None = None) -> str:
    found = value.get(field, missing)
    if not isinstance(found, str):
        problem = "must be text" if field in value else f"is missing; found: {', '.join(value) or 'nothing'}"
        raise UserError(f'{where}: field "{field}" {problem}')
    return found


def items(value: Mapping[str, Any], field: str, where: str) -> list[dict[str, Any]]:
    found = value.get(field)
    if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
        raise UserError(f'{where}: field "{field}": a list of objects is expected, got {shown(found)}')
    return found


def first_of(values: list[Any], field: str, where: str) -> Any:
    if not values:
        raise UserError(f'{where}: field "{field}" is empty')
    return values[0]


def first_turn(value: Mapping[str, Any], where: str) -> str:
    """What is said first in a conversation of one side, or the whole text."""
    turns = value.get("turns")
    if not isinstance(turns, list):
        return text(value, "text", where)
    return text({"turns": first_of(turns, "turns", where)}, "turns", where)
