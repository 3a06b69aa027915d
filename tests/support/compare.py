"""What two runs of one run file are compared by."""

import json
from pathlib import Path

MEASURED = {"seconds", "tokens_per_second"}
"""Figures of a step that differ between any two runs."""


def lines(directory: Path) -> list[dict[str, object]]:
    """The whole lines of metrics.jsonl."""
    file = directory / "metrics.jsonl"
    written = file.read_text().split("\n")[:-1] if file.exists() else []
    return [json.loads(line) for line in written]


def steps(directory: Path) -> int:
    """Training steps in metrics.jsonl."""
    return sum("loss" in line for line in lines(directory))


def figures(directory: Path) -> list[dict[str, object]]:
    """All lines, without what depends on the machine's speed."""
    return [{k: v for k, v in line.items() if k not in MEASURED} for line in lines(directory)]


def newest_state(directory: Path) -> dict[str, object]:
    states = directory / "resume"
    return json.loads((states / (states / "LATEST").read_text().strip() / "state.json").read_text())
