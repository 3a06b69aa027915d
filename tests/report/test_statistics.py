"""Means, deviations and intervals, against numpy and against closed forms."""

import math

import numpy as np
import pytest

from dskd.report.statistics import average, paired_bootstrap, summarize

SCORES = {(0, 10): 1.0, (0, 20): 3.0, (1, 10): 5.0, (1, 20): 9.0}


def test_deviations_over_training_and_sampling_seeds():
    found = summarize(SCORES)
    table = np.array([[1.0, 3.0], [5.0, 9.0]])
    assert found.mean == pytest.approx(table.mean())
    assert found.deviation == pytest.approx(table.std(ddof=1))
    assert found.training == pytest.approx(table.mean(1).std(ddof=1))
    assert found.sampling == pytest.approx(math.sqrt(table.var(1, ddof=1).mean()))


def test_one_score_has_no_deviation():
    found = summarize({(0, 10): 4.0})
    assert (found.mean, found.deviation, found.training, found.sampling) == (4.0, None, None, None)
    assert summarize({}) is None


def test_averages_are_over_sets_that_have_the_same_seeds():
    double = {key: 2 * score for key, score in SCORES.items()}
    assert average([SCORES, double]) == {key: 1.5 * score for key, score in SCORES.items()}
    assert average([SCORES, {(0, 10): 1.0}]) == {}


def test_the_bootstrap_s_interval_is_that_of_the_mean_of_many_records():
    differences = np.random.default_rng(3).normal(0.4, 2.0, 400).tolist()
    found = paired_bootstrap(differences)
    margin = 1.96 * np.std(differences) / math.sqrt(len(differences))
    assert found.difference == pytest.approx(np.mean(differences))
    assert found.low == pytest.approx(found.difference - margin, abs=0.15 * margin)
    assert found.high == pytest.approx(found.difference + margin, abs=0.15 * margin)
    assert found.is_clear == (abs(found.difference) > margin)
    assert found == paired_bootstrap(differences)


def test_equal_answers_are_no_difference():
    found = paired_bootstrap([0.0] * 20)
    assert (found.difference, found.low, found.high, found.is_clear) == (0.0, 0.0, 0.0, False)
