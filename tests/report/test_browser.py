"""The report of tens of runs as a browser shows it: small, without a complaint, and with its curves drawn."""

import os
import shutil
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.run_directories import Maker, write_evaluation

from dskd.report.charts import COLOURS
from dskd.report.write import write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
OPTIONS = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr")
SECONDS = 180


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """The report of 20 runs of 220 steps, with hostile answers."""
    folder = tmp_path_factory.mktemp("page")
    make, hostile = Maker(folder / "made"), "</p><script>console.error('ran')</script><img src='http://x'>"
    seeds = [(rate, seed) for rate in range(1, 11) for seed in (10, 20)]
    runs = [
        make("kd", seed, 220, f"{rate}-{seed}", method={"kind": "kd", "kd_rate": rate / 10}) for rate, seed in seeds
    ]
    for run in runs:
        write_evaluation(run, "dolly", {1: [5.0, 6.0]}, [hostile])
    return write_report(runs, folder / "report.html", None, "paper")[0]


def test_tens_of_long_runs_stay_below_two_megabytes(page):
    assert page.stat().st_size < 2e6


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: tests/report/packages.sh installs it on Debian")
def test_a_browser_draws_every_curve_and_has_nothing_to_complain_of(page, tmp_path):
    shot = tmp_path / "shot.png"
    places = (f"--user-data-dir={tmp_path / 'chromium'}", f"--screenshot={shot}", "--window-size=1200,5000")
    command = [str(CHROMIUM), *OPTIONS, *places, page.as_uri()]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        _, said = process.communicate(timeout=SECONDS)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert [line for line in said.splitlines() if "CONSOLE" in line] == []
    pixels = np.asarray(Image.open(shot).convert("RGB")).astype(np.int16)
    assert pixels.shape == (5000, 1200, 3)
    for colour in COLOURS:
        wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        near = (abs(pixels - wanted).max(-1) < 12).sum()
        assert near > 1000, f"{colour} is on {near} pixels"
