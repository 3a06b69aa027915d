"""Published averages of ROUGE-L, with what they were measured on, to be shown beside one's own."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    source: str
    pair: str
    """Teacher and student."""
    sets: int
    """Over how many sets of records it is an average."""
    rougel: Mapping[str, float]
    """By kind of method; `seqkd` and `teacher` are no kinds here."""


RERUN = "arXiv 2602.21669, an independent re-run"
PAPER = (
    Published(
        "arXiv 2406.17328, as quoted by later work",
        "Qwen1.5-1.8B to GPT2-120M",
        5,
        {"seqkd": 16.13, "mined": 17.46, "uld": 17.11, "dskd_cma": 18.02},
    ),
    Published(
        RERUN,
        "Qwen1.5-1.8B to GPT2-120M",
        4,
        {"sft": 13.85, "uld": 15.36, "mined": 16.40, "dskd_cma": 16.68, "teacher": 25.44},
    ),
    Published(
        RERUN,
        "Mistral-7B to TinyLlama-1.1B",
        4,
        {"sft": 20.57, "uld": 23.26, "mined": 23.05, "dskd_cma": 23.54, "teacher": 28.31},
    ),
)
COMPARED = {"paper": PAPER}
"""What --compare takes."""
