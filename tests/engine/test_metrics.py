"""What a run tells, and that a full disk is told as well."""

import json
import re

import pytest

from dskd.config.errors import UserError
from dskd.engine import metrics
from dskd.engine.metrics import Monitor
from dskd.rundir.layout import RunDirectory


def test_each_step_is_one_line(tmp_path):
    with Monitor(RunDirectory(tmp_path), 2, is_main=True) as monitor:
        for step in (1, 2):
            monitor.step({"step": step, "loss": 0.5, "tokens_per_second": 10.0, "seconds": 0.1})
            written = (tmp_path / "metrics.jsonl").read_text().splitlines()
            assert [json.loads(line)["step"] for line in written] == list(range(1, step + 1))
    assert "step 2/2  loss 0.5000" in (tmp_path / "train.log").read_text()


def test_a_step_is_shown_with_its_rate_gradient_and_memory(tmp_path, capfd):
    with Monitor(RunDirectory(tmp_path), 1, is_main=True) as monitor:
        figures = {
            "loss": 0.5,
            "lr": 5e-4,
            "grad_norm": 1.234,
            "tokens_per_second": 10.0,
            "gpu_gib": 3.21,
            "seconds": 1.0,
        }
        monitor.step({"step": 1} | figures)
    expected = "step 1/1  loss 0.5000  lr 5.00e-04  gradient 1.23  10 tokens/s  3.2 GiB  about "
    assert capfd.readouterr().err.startswith(expected)


def test_what_takes_long_is_told_without_a_terminal_too(capfd, monkeypatch):
    monkeypatch.setattr(metrics, "PLAIN_SECONDS", 0.0)
    with metrics.progress_bar("answers") as progress:
        progress(1, 4)
    assert re.fullmatch(r"answers: 1/4  about \d+\.\d min left\n", capfd.readouterr().err)


def test_other_ranks_write_nothing(tmp_path):
    with Monitor(RunDirectory(tmp_path), 1, is_main=False) as monitor:
        monitor.write({"step": 1, "loss": 0.5})
    assert list(tmp_path.iterdir()) == []


def test_no_space_for_a_metric_is_one_line(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    full = r"^output\.root: cannot write .*: No space left on device$"
    with pytest.raises(UserError, match=full), Monitor(RunDirectory(tmp_path), 1, is_main=True) as monitor:
        monitor.write({"step": 1, "loss": 0.5})
