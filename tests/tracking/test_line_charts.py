from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from line_charts import HEIGHT, WIDTH, Series, line_chart, moving_mean, ticks

from searchr1.report.curves import compact

values = st.floats(-1e12, 1e12, allow_nan=False)
points = st.dictionaries(st.integers(0, 2000).map(float), values, max_size=200).map(lambda found: sorted(found.items()))


@given(st.lists(points, max_size=6))
def test_any_numbers_give_well_formed_drawings_inside_their_frame(lines):
    drawn = line_chart("A title", [Series(f"line {i}", line) for i, line in enumerate(lines)])
    if not drawn:
        return
    root = ElementTree.fromstring(drawn)
    for shape in root.iter():
        for x, y in re.findall(r"(\S+),(\S+)", shape.get("points", "")):
            assert 0 <= float(x) <= WIDTH
            assert 0 <= float(y) <= HEIGHT


@given(values, values)
def test_ticks_are_round_few_and_around_the_range(one, other):
    low, high = sorted((one, other))
    if high - low < 1e-9 * max(abs(low), abs(high), 1):
        return
    found = ticks(low, high, 5)
    step = found[1] - found[0]
    assert 2 <= len(found) <= 7
    assert found[0] <= low + step * 1e-6
    assert found[-1] >= high - step * 1e-6


def test_ticks_by_hand():
    assert ticks(0, 1, 6) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert ticks(0, 1, 5) == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    assert ticks(-3, 17, 5) == [-5, 0, 5, 10, 15, 20]


def test_a_line_goes_where_its_values_are():
    drawn = line_chart("Reward", [Series("mean", [(0.0, 0.0), (10.0, 1.0)])])
    (path,) = re.findall(r'<polyline class="line c0" points="([^"]*)"', drawn)
    assert path == f"52.0,{HEIGHT - 24} {WIDTH - 10},10.0"
    assert "<title>mean, step 10: 1</title>" in drawn
    assert "mean 1</span>" in drawn


def test_long_lines_are_smoothed_on_top_of_the_raw_values():
    line = Series("a", [(float(x), float(x % 2)) for x in range(200)])
    drawn = line_chart("t", [line])
    assert 'class="raw c0"' in drawn
    assert drawn.count("<circle") <= 120
    assert moving_mean(line.points, 10)[100][1] == pytest.approx(0.5, abs=0.03)
    assert moving_mean([(0.0, 1.0), (1.0, 3.0), (2.0, 5.0)], 1) == [(0.0, 2.0), (1.0, 3.0), (2.0, 4.0)]


def test_nothing_to_draw():
    assert line_chart("t", []) == line_chart("t", [Series("a", [])]) == ""


def test_names_are_escaped():
    drawn = line_chart("<i>", [Series("<b>&", [(0.0, 1.0), (1.0, 2.0)])], "<u>")
    ElementTree.fromstring(drawn)
    assert not re.search("<[biu]>", drawn)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.5, "0.5"),
        (0.12345, "0.123"),
        (1234.4, "1234"),
        (51713, "51.7k"),
        (2.4e-6, "2.4e-06"),
        (3e7, "3.0e+07"),
        (-0.25, "-0.25"),
    ],
)
def test_compact(value, text):
    assert compact(value) == text
