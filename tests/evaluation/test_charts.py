import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from ov3fast.evaluation.charts import Boundary, Series, line_chart, smoothed, thin


def lines(chart: str, colour: str = "var(--c0)") -> list[np.ndarray]:
    """Points [n, 2] of the lines of a colour."""
    found = re.findall(r'<path d="([^"]*)" style="[^"]*stroke: ' + re.escape(colour), chart)
    return [np.array(re.findall(r"([-\d.]+) ([-\d.]+)", path), float) for path in found]


def test_a_straight_line_is_straight_and_rises():
    [points] = lines(line_chart("t", [Series("a", [0, 50, 100], [0, 5, 10])]))
    assert (np.diff(points[:, 0]) > 0).all() and (np.diff(points[:, 1]) < 0).all()  # up is small y
    slopes = np.diff(points[:, 1]) / np.diff(points[:, 0])
    assert np.ptp(slopes) < 1e-3 * abs(slopes[0])


def test_a_logarithmic_axis_has_even_decades():
    chart = line_chart("t", [Series("a", [0, 1, 2], [1, 10, 1000])], log_y=True)
    [points] = lines(chart)
    rise = -np.diff(points[:, 1])
    assert rise[1] == pytest.approx(2 * rise[0], rel=1e-3) and "logarithmic" in chart
    assert "logarithmic" not in line_chart("t", [Series("a", [0, 1], [-1, 100])], log_y=True)


def test_it_is_well_formed_escaped_and_asks_for_nothing():
    series = [Series("x<y", [1, 2], [1, 2]), Series("z", [1, 2], [2, 1])]
    chart = line_chart('a < "b" & c', series, boundaries=[Boundary(1.5, "<s>")])
    root = ElementTree.fromstring(chart)
    texts = [element.text.strip() for element in root.iter("text")]
    assert 'a < "b" & c' in texts and "x<y" in texts and "<s>" in texts and "step" in texts
    assert root.attrib["aria-label"].startswith('a < "b" & c')
    assert not re.search(r"https?:|url\(|<script|<image|#0000", chart)
    assert len(lines(chart)) >= 1 and len(lines(chart, "var(--c1)")) >= 1
    assert len(chart) < 20_000


def test_the_same_input_gives_the_same_text_and_ids_differ_by_title():
    first, again, other = (line_chart(title, [Series("a", [0, 1], [0, 1])]) for title in ("one", "one", "two"))
    assert first == again
    ids = [set(re.findall(r'\bid="([^"]*)"', chart)) for chart in (first, other)]
    assert ids[0] and not ids[0] & ids[1]
    assert {reference for reference in re.findall(r'href="#([^"]*)"', first)} <= ids[0]


def test_non_finite_points_and_empty_series_are_left_out():
    chart = line_chart("t", [Series("a", [0, 1, 2, 3], [1, float("nan"), float("inf"), 2]), Series("b", [], [])])
    assert len(lines(chart)[0]) == 2 and "nan" not in chart and "inf" not in chart
    assert line_chart("t", [Series("a", [], [])]) == "" == line_chart("t", [])


@pytest.mark.parametrize("y", [0.0, 5.0, -2.0])
def test_single_and_constant_values_are_drawn(y):
    ElementTree.fromstring(line_chart("t", [Series("a", [3], [y])]))
    ElementTree.fromstring(line_chart("t", [Series("a", [0, 10], [y, y])], log_y=True))


def test_smoothing_draws_both_lines():
    wave = [(-1) ** i for i in range(100)]
    raw, smooth = lines(line_chart("t", [Series("a", list(range(100)), wave)], smoothing=0.1))
    assert np.ptp(smooth[10:-10, 1]) < 0.2 * np.ptp(raw[10:-10, 1])


def test_smoothed():
    assert smoothed([1, 2, 3, 4, 5], 3).tolist() == [1, 2, 3, 4, 5]
    assert smoothed([0, 3, 0, 3, 0], 3).tolist() == [0, 1, 2, 1, 0]
    assert smoothed([4.0], 9).tolist() == [4.0]


def test_thin_keeps_the_mean():
    values = thin([x % 7 for x in range(1000)], 100)
    assert len(values) == 100 and values.mean() == pytest.approx(sum(x % 7 for x in range(1000)) / 1000)
