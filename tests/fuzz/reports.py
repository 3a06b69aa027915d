"""What a report reads of a run, and the page that is made of it."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from dskd.config.load import load_run
from dskd.report.content import build
from dskd.report.markdown import markdown
from dskd.report.page import page
from dskd.report.runs import Run, grouped, set_scores
from dskd.rundir.analysis import Analysis, Compared, Spread, read_analysis
from dskd.rundir.evaluations import read_evaluation
from dskd.rundir.layout import ANSWERS, RESULTS, RunDirectory, analysis_of
from dskd.rundir.read import read_evaluations, read_steps
from fuzz.mutations import of_json, of_json_lines
from fuzz.run import Target

STEPS = b"""\
{"step": 1, "loss": 2.5, "grad_norm": 0.1, "tokens_per_second": 2.5, "seconds": 1.0}
{"step": 2, "loss": 2.0, "grad_norm": 90.0, "gpu_gib": 2.5, "tokens_per_second": 3.5, "seconds": 1.0}
{"step": 2, "dev_loss": 2.5, "dev_accuracy": 0.5}
"""
ANSWER = {"index": 1, "seed": 3, "prompt": "p <b>|", "answer": "a </p>", "references": ["r"], "rougel": 5.0}
SCORES = {"records": 4, "seeds": [3, 4], "generation": {"greedy": False}, "rougel": {"by_seed": [1.5, 2.5]}}
SPREAD = Spread(0.5, 0.25, 0.5, 0.75)
ANALYSIS = Analysis("t", "d", 4, 40, False, Compared("a", SPREAD, SPREAD, SPREAD, None), Compared("b", *[SPREAD] * 4))


def report_targets(folder: Path, settings: Path) -> list[Target]:
    """Targets that work in `folder`, with the run of a run file."""
    place, evaluation = RunDirectory(folder / "student" / "sft" / "fuzzed"), folder / "eval" / "set"
    place.path.mkdir(parents=True)
    evaluation.mkdir(parents=True)
    empty = Run(place.path, load_run(settings), [], [], {}, {}, {}, None)

    def into(file: Path, change: Callable[[], Run]) -> Callable[[bytes], object]:
        def written(content: bytes) -> object:
            file.write_bytes(content)
            document = build(grouped([change()]), {}, ())
            return page(document), markdown(document)

        return written

    def scored() -> Run:
        found = read_evaluation(evaluation / RESULTS, folder / "eval")
        return replace(empty, sets={"set": set_scores([found])})

    def with_curves() -> Run:
        return replace(empty, steps=read_steps(place), evaluations=read_evaluations(place))

    def answered() -> Run:
        (evaluation / RESULTS).write_text(json.dumps(SCORES))
        return scored()

    def analyzed() -> Run:
        return replace(empty, analysis=read_analysis(place.path))

    lines = "".join(json.dumps(ANSWER | {"index": i, "seed": seed}) + "\n" for seed in (3, 4) for i in range(4))
    return [
        Target("report: curves", [STEPS], of_json_lines, into(place.metrics, with_curves)),
        Target("report: scores", [json.dumps(SCORES).encode()], of_json, into(evaluation / RESULTS, scored)),
        Target("report: answers", [lines.encode()], of_json_lines, into(evaluation / ANSWERS, answered)),
        Target(
            "report: analysis",
            [json.dumps(asdict(ANALYSIS)).encode()],
            of_json,
            into(analysis_of(place.path), analyzed),
        ),
    ]
