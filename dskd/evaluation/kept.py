"""Answers kept while they are made, one JSON object a line, so that what was answered is not answered again."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dskd.rundir.files import read_json, read_json_lines, write_all, write_text


def identity_of(asked: Mapping[str, Any]) -> str:
    """A sum of all that decides the answers, by which those to another question are told apart."""
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def read_kept(file: Path, identity: str) -> list[dict[str, Any]]:
    """The lines of a file that holds answers to this question; none of another one, or where there is no file."""
    lines = read_json_lines(file)
    return list(lines) if next(lines, {}).get("identity") == identity else []


def read_finished(answers: Path, results: Path, identity: str) -> list[dict[str, Any]]:
    """The same of an evaluation that is complete."""
    return list(read_json_lines(answers)) if (read_json(results) or {}).get("identity") == identity else []


def begin(file: Path, identity: str) -> None:
    """Make the file, unless it is there with answers to this question."""
    if next(read_json_lines(file), {}).get("identity") != identity:
        write_text(file, json.dumps({"identity": identity}) + "\n")


def add(file: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Add lines. They begin anew: the last write may have been cut short, and a line that is not whole is none."""
    with file.open("ab", buffering=0) as out:
        write_all(out, "".join(f"\n{json.dumps(line)}" for line in lines).encode() + b"\n")
