"""Records: jsonl files of {"prompt": text, "output": text or list of texts}."""

import json
from dataclasses import dataclass
from pathlib import Path

from dskd.config.errors import UserError


@dataclass(frozen=True)
class Record:
    prompt: str
    """What the model is given, in its final form (template included)."""
    outputs: tuple[str, ...]
    """Acceptable answers; training uses the first, evaluation the best match."""


def read_records(file: Path) -> list[Record]:
    """All records of a jsonl file; record i stands on line i + 1 of those that are not blank.

    Raises:
        UserError: naming file and line, for JSON that does not parse, a missing field, an empty answer, an empty file.
    """
    records = []
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    records.append(parse_record(line, f"{file}:{number}"))
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    if not records:
        raise UserError(f"{file}: is empty; at least one record is expected")
    return records


def parse_record(line: bytes, where: str) -> Record:
    """One line of a jsonl file; `where` names it in errors."""
    try:
        value = json.loads(line.decode().rstrip())
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: is not UTF-8 text ({error.reason} at byte {error.start} of the line)") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: broken JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(value, dict):
        raise UserError(f'{where}: an object {{"prompt": ..., "output": ...}} is expected')
    for field in ("prompt", "output"):
        if field not in value:
            raise UserError(f'{where}: field "{field}" is missing; found: {", ".join(value) or "nothing"}')
    if not isinstance(value["prompt"], str):
        raise UserError(f'{where}: "prompt" must be text')
    outputs = value["output"] if isinstance(value["output"], list) else [value["output"]]
    if not all(isinstance(output, str) for output in outputs):
        raise UserError(f'{where}: "output" must be text or a list of texts')
    if not outputs or not all(output.strip() for output in outputs):
        raise UserError(f'{where}: "output" is empty; a response of at least one character is expected')
    try:
        "".join((value["prompt"], *outputs)).encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: holds half a character (a lone surrogate such as \\ud83d)") from None
    return Record(value["prompt"], tuple(outputs))
