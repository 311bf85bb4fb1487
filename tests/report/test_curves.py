"""Charts: axes with round numbers, lines in their places, values where the pointer rests."""

import math
import re
from xml.etree import ElementTree

import pytest

from captioner.report.curves import Line, chart, number, thinned


def texts(svg: str) -> list[str]:
    """The numbers beside the axes, and the name of the x axis."""
    return [element.text or "" for element in ElementTree.fromstring(svg).iter() if element.tag == "text"]


def hovers(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter() if element.tag == "title"]


def places(svg: str) -> list[tuple[float, float]]:
    """The points of the first line."""
    (path, *_) = re.findall(r'class="line c\d" d="([^"]*)"', svg)
    return [(float(x), float(y)) for x, y in re.findall(r"[ML]([\d.]+) ([\d.]+)", path)]


def test_axes_have_round_numbers() -> None:
    svg = chart([Line("CIDEr", [(1, 0.03), (2, 0.21), (3, 0.26)], 1, dots=True)])
    assert texts(svg) == ["0", "0.05", "0.1", "0.15", "0.2", "0.25", "0.3", "0", "1", "2", "3", "epoch"]


def test_a_higher_value_is_higher_and_a_later_one_further_right() -> None:
    (x1, y1), (x2, y2), (x3, y3) = places(chart([Line("a", [(1, 5), (2, 7), (3, 6)], 1)]))
    assert x1 < x2 < x3
    assert x2 - x1 == pytest.approx(x3 - x2, abs=0.11)
    assert y1 > y3 > y2
    assert y1 - y3 == pytest.approx(y3 - y2, abs=0.11)


def test_equal_factors_are_equally_far_apart_on_a_logarithmic_axis() -> None:
    (_, low), (_, middle), (_, high) = places(chart([Line("a", [(1, 0.5), (2, 5), (3, 50)], 1)], log=True))
    assert low - middle == pytest.approx(middle - high, abs=0.11)
    assert {"1", "10"} <= {*texts(chart([Line("a", [(1, 0.5), (2, 5), (3, 50)], 1)], log=True))}


def test_values_are_shown_where_the_pointer_rests() -> None:
    lines = [Line("training", [(0.5, 4.0), (1, 3.0)], 1), Line("<validation>", [(1, 3.5)], 2)]
    assert hovers(chart(lines)) == ["epoch 0.5\ntraining: 4", "epoch 1\ntraining: 3\n<validation>: 3.5"]


def test_a_value_that_is_no_number_leaves_a_gap() -> None:
    svg = chart([Line("loss", [(1, 2.0), (2, math.nan), (3, 2.5)], 1)])
    (path,) = re.findall(r'class="line c1" d="([^"]*)"', svg)
    assert path.count("M") == 2
    assert "epoch 2\nloss: not a number" in hovers(svg)
    assert chart([Line("loss", [(1, math.nan)], 1)]) == ""
    assert chart([]) == ""


@pytest.mark.parametrize("values", [[0.0], [3.0, 3.0], [-0.4, -0.5], [1e-7, 2e-7], [1e9, 1e-9]])
@pytest.mark.parametrize("log", [False, True])
def test_any_values_can_be_drawn(values: list[float], log: bool) -> None:
    svg = chart([Line("a", list(enumerate(values)), 1)], log=log, level=5)
    if svg:
        ElementTree.fromstring(svg)
        assert "nan" not in svg
        assert len(texts(svg)) < 25


def test_many_points_are_averaged() -> None:
    points = [(float(x), float(x % 2)) for x in range(10_000)]
    few = thinned(points)
    assert len(few) <= 160
    assert few[-1][0] == 9999
    assert all(y == pytest.approx(0.5, abs=0.02) for _, y in few)
    assert thinned(points[:100]) == points[:100]


def test_numbers_are_short() -> None:
    assert [number(value) for value in (0, 0.25, 3.14159, 12345.0, 0.0002, -1e-5, math.inf)] == [
        "0", "0.25", "3.142", "12,345", "2e-4", "-1e-5", "not a number",
    ]  # fmt: skip
