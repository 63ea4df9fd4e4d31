import re
import xml.etree.ElementTree as ElementTree

import pytest

from ov3fast.evaluation import svg
from ov3fast.evaluation.svg import Boundary, Series, line_chart


def paths(chart: str, kind: str) -> list[list[tuple[float, float]]]:
    """Points of the <path>s of a class."""
    found = re.findall(rf'<path class="{kind}" d="M([^"]*)"', chart)
    return [[tuple(map(float, point.split())) for point in path.split("L")] for path in found]


def test_a_straight_line_is_where_it_belongs():
    chart = line_chart("t", [Series("a", [0, 50, 100], [0, 5, 10])])
    [[first, middle, last]] = paths(chart, "line c0")
    assert first[0] == svg.LEFT and last[0] == svg.WIDTH - svg.RIGHT
    assert middle == pytest.approx(((first[0] + last[0]) / 2, (first[1] + last[1]) / 2), abs=0.1)
    assert last[1] < first[1] <= svg.HEIGHT - svg.BOTTOM  # up is small y


def test_a_logarithmic_axis_has_even_decades():
    chart = line_chart("t", [Series("a", [0, 1, 2], [1, 10, 100])], log_y=True)
    [[a, b, c]] = paths(chart, "line c0")
    assert a[1] - b[1] == pytest.approx(b[1] - c[1], abs=0.2)
    assert "logarithmic" in chart
    assert "logarithmic" not in line_chart("t", [Series("a", [0, 1], [-1, 100])], log_y=True)


def test_it_is_well_formed_and_escaped():
    chart = line_chart(
        'a < "b" & c', [Series("x<y", [1, 2], [1, 2]), Series("z", [1, 2], [2, 1])], boundaries=[Boundary(1.5, "<s>")]
    )
    root = ElementTree.fromstring(chart)
    texts = [element.text for element in root.iter("text")]
    assert 'a < "b" & c' in texts and "x<y" in texts and "<s>" in texts
    assert root.attrib["aria-label"].startswith('a < "b" & c')


def test_non_finite_points_and_empty_series_are_left_out():
    chart = line_chart("t", [Series("a", [0, 1, 2, 3], [1, float("nan"), float("inf"), 2]), Series("b", [], [])])
    assert len(paths(chart, "line c0")[0]) == 2 and "nan" not in chart and "inf" not in chart
    assert line_chart("t", [Series("a", [], [])]) == "" == line_chart("t", [])


def test_single_and_constant_values_are_drawn():
    for y in (0.0, 5.0, -2.0):
        chart = line_chart("t", [Series("a", [3], [y])])
        assert "nan" not in chart and len(paths(chart, "line c0")[0]) == 2
    ElementTree.fromstring(line_chart("t", [Series("a", [0, 10], [7, 7])], log_y=True))


def test_smoothing_draws_both_lines():
    wave = [(-1) ** i for i in range(100)]
    chart = line_chart("t", [Series("a", list(range(100)), wave)], smoothing=0.1)
    [raw], [smooth] = paths(chart, "line raw c0"), paths(chart, "line c0")
    spread = lambda points: max(y for _, y in points[10:-10]) - min(y for _, y in points[10:-10])  # noqa: E731
    assert spread(smooth) < 0.2 * spread(raw)


def test_smoothed():
    assert svg.smoothed([1, 2, 3, 4, 5], 3) == [1, 2, 3, 4, 5]
    assert svg.smoothed([0, 3, 0, 3, 0], 3) == [0, 1, 2, 1, 0]
    assert svg.smoothed([4.0], 9) == [4.0]


def test_thin_keeps_the_mean():
    line = svg.thin(Series("a", list(range(1000)), [x % 7 for x in range(1000)]), 100)
    assert len(line.x) == 100 and sum(line.y) / 100 == pytest.approx(sum(x % 7 for x in range(1000)) / 1000)
    assert list(line.x) == sorted(line.x)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.013, 0.027), (-3, 12), (10, 4990), (1e-5, 3e-5), (5, 5.0001)])
def test_ticks_are_round_and_inside(low, high):
    ticks = svg.linear_ticks(low, high, 5)
    assert 2 <= len(ticks) <= 7 and all(low - 1e-9 <= t <= high + 1e-9 for t in ticks)
    steps = {round((b - a) / (ticks[1] - ticks[0]), 6) for a, b in zip(ticks, ticks[1:], strict=False)}
    assert steps == {1.0}
    assert f"{ticks[1] - ticks[0]:.0e}"[0] in "125"


def test_log_ticks():
    assert svg.log_ticks(0.8, 30) == [1, 2, 5, 10, 20]
    assert svg.log_ticks(1e-4, 2) == [1e-4, 1e-3, 1e-2, 0.1, 1]


@pytest.mark.parametrize(
    ("value", "label"), [(0, "0"), (0.25, "0.25"), (30.0, "30"), (1500, "1.5k"), (2e6, "2M"), (1e-5, "1e-5"), (-0.5, "-0.5")]
)
def test_tick_labels(value, label):
    assert svg.tick_label(value) == label
