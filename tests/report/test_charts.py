import xml.etree.ElementTree as ET

import pytest

from ip2p.evaluate.bootstrap import Estimate
from ip2p.report.charts import HEIGHT, WIDTH, Point, Series, legend, line_chart, ticks


def point(x: float, y: float, **more) -> Point:
    return Point(x, Estimate(y, y - 0.1, y + 0.1, 9), **more)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]), (-1.2, 3.8, [-1, 0, 1, 2, 3]), (0, 1234, [0, 500, 1000])],
)
def test_ticks_are_round(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


def test_chart_is_well_formed_and_inside_its_frame():
    series = [Series("a <b>", [point(1, 0.5), point(2, 0.7, label="s & t", x_interval=(1.8, 2.4))]), Series("c", [])]
    root = ET.fromstring(line_chart(series, "x", "y < 1", "title"))
    circles = [node for node in root.iter() if node.tag == "circle"]
    assert len(circles) == 2
    assert all(0 <= float(node.attrib["cx"]) <= WIDTH and 0 <= float(node.attrib["cy"]) <= HEIGHT for node in circles)
    assert float(circles[1].attrib["cy"]) < float(circles[0].attrib["cy"]), "more is higher"
    assert "a &lt;b&gt;" in legend(series)


def test_colours_belong_to_the_series_and_not_to_their_place_among_those_shown():
    series = [Series("empty", []), Series("full", [point(1, 1), point(2, 2)])]
    assert 'class="s1"' in line_chart(series, "x", "y", "t")
    assert 's1"' in legend(series)


def test_not_finite_points_are_left_out():
    assert line_chart([Series("a", [point(1, float("nan"))])], "x", "y", "t") == ""
    flat = line_chart([Series("a", [point(1, 0.5), point(2, float("nan"))])], "x", "y", "t")
    assert "nan" not in flat
