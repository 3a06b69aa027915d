"""`dskd evaluate` as typed: answers and results on disk."""

import json
import os
import statistics
import subprocess
import sys

import pytest

from dskd.launch.ranks import rank_environment


def test_evaluate_gives_the_same_answers_on_one_and_two_processes(tiny, make_run, tmp_path):
    make_run(tmp_path)
    sizes = ["--batch-size", "3", "--max-length", "40", "--max-prompt-length", "30", "--precision", "fp32"]
    outside = {k: v for k, v in os.environ.items() if k not in rank_environment(0, 1, 0)}
    started = []
    for processes in ("1", "2"):
        command = [sys.executable, "-m", "dskd", "evaluate", tiny("llama"), "--data", tmp_path / "dev.jsonl", *sizes]
        command += ["--seeds", "10", "20", "--processes", processes, "--output", tmp_path / processes]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(list(map(str, command)), env=outside, **pipes))
    for process in started:
        out, error = process.communicate(timeout=120)
        assert process.returncode == 0, error
        assert "ROUGE-L" in out
        assert "10 records, seeds 10, 20: " in out
    one, two = ((tmp_path / n / "answers.jsonl").read_text().splitlines() for n in "12")
    assert one == two
    answers = [json.loads(line) for line in one]
    assert [(a["seed"], a["index"]) for a in answers] == [(s, i) for s in (10, 20) for i in range(10)]
    results = json.loads((tmp_path / "2" / "results.json").read_text())
    assert (results["records"], results["seeds"], results["generation"]["max_length"]) == (10, [10, 20], 40)
    by_seed = [statistics.fmean(a["rougel"] for a in answers if a["seed"] == seed) for seed in (10, 20)]
    assert results["rougel"]["by_seed"] == pytest.approx(by_seed)
    assert results["rougel"]["mean"] == pytest.approx(sum(by_seed) / 2)
    assert results["rougel"]["deviation"] == pytest.approx(abs(by_seed[0] - by_seed[1]) / 2**0.5)
