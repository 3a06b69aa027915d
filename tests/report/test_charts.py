"""Charts: every axis readable, every label in its place, whatever the numbers are."""

import itertools
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dskd.report.charts import BOTTOM, COLOURS, LABEL_GAP, TOP, apart, line_chart, nice_ticks, style_sheet, vertical
from dskd.report.curves import thinned
from dskd.report.document import Chart, Line

NUMBERS = st.floats(-1e9, 1e9, allow_nan=False)


@given(NUMBERS, NUMBERS, st.booleans())
def test_ticks_are_few_and_even(a, b, around):
    low, high = sorted((a, b))
    ticks = nice_ticks(low, high, around=around)
    assert 1 <= len(ticks) <= 8
    gaps = [after - before for before, after in itertools.pairwise(ticks)]
    assert all(gap == pytest.approx(gaps[0], rel=1e-6) and gap > 0 for gap in gaps)
    slack = 1e-6 * max(1.0, abs(low), abs(high))
    if around:
        assert ticks[0] <= low + slack
        assert ticks[-1] >= high - slack
    else:
        assert all(low - slack <= tick <= high + slack for tick in ticks)


def test_ticks_of_a_known_range():
    assert nice_ticks(0.3, 4.1) == [1, 2, 3, 4]
    assert nice_ticks(0.3, 4.1, around=True) == [0, 1, 2, 3, 4, 5]
    assert nice_ticks(2.0, 2.0) == [2.0]


def test_a_wide_range_of_gradients_gets_decades():
    ticks, scale = vertical(0.02, 700.0, log=True)
    assert ticks == pytest.approx([0.01, 0.1, 1, 10, 100, 1000])
    assert (scale(0.01), scale(1000.0)) == (BOTTOM, TOP)
    assert scale(100.0) - scale(1000.0) == pytest.approx(scale(0.1) - scale(1.0))


@given(st.lists(st.floats(TOP, BOTTOM), max_size=16))
def test_labels_do_not_cover_each_other(places):
    found = apart(sorted(places), LABEL_GAP)
    assert all(after - before >= LABEL_GAP - 1e-9 for before, after in itertools.pairwise(found))
    assert all(TOP - 1e-9 <= place <= BOTTOM + 1e-9 for place in found)


@given(st.lists(NUMBERS, min_size=1, max_size=300), st.integers(12, 50))
def test_a_thinned_curve_keeps_its_ends_and_its_mean(values, most):
    points = [(float(step), value) for step, value in enumerate(values)]
    found = thinned(points, most)
    assert len(found) <= max(most, 1)
    assert (found[0], found[-1]) == (points[0], points[-1])
    assert [x for x, _ in found] == sorted(x for x, _ in found)
    assert min(values) - 1e-3 <= min(y for _, y in found) <= max(y for _, y in found) <= max(values) + 1e-3


def test_a_chart_is_xml_with_a_line_for_each_run_and_a_mark_where_one_was_started_again():
    lines = [
        Line(f"kd <{seed}>, seed {seed}", 1, [(1, 3.0), (2, 1.0), (3, 2.0)], [2.0] * (seed == 20)) for seed in (10, 20)
    ]
    root = ElementTree.fromstring(line_chart(Chart('loss "&"', lines)).replace("<svg ", "<svg ", 1))
    paths = [path for path in root.iter("path") if "line" in path.get("class").split()]
    assert len(paths) == 2
    assert {path.get("class") for path in paths} == {"line s1"}
    numbers = [float(n) for n in re.findall(r"[\d.]+", paths[0].get("d"))]
    assert numbers[0::2] == sorted(numbers[0::2])
    assert numbers[1] < numbers[5] < numbers[3]  # 3.0 above 2.0 above 1.0, downwards as in SVG
    marks = [path for path in root.iter("path") if "restart" in path.get("class").split()]
    assert len(marks) == 1
    assert marks[0].find("title").text == "kd <20>, seed 20: started again after step 2"
    assert [text.text for text in root.iter("text") if text.get("class") == "label"] == ["kd <10>"]


def test_styles_differ_in_their_dashes_where_their_colours_are_the_same():
    rules = re.findall(r"\.s\d+{(.*?)}", style_sheet())
    assert len(set(rules)) == len(rules) == 5 * len(COLOURS)
