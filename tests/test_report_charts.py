"""Charts: coordinates by hand, round ticks, and text that stays text."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import xml.etree.ElementTree as ET

import pytest

from maml_rl.looks import MARKERS, STYLES
from maml_rl.report.charts import (
    DASHES,
    MARKS,
    NARROW,
    SMALL,
    WIDE,
    Axis,
    Chart,
    Frame,
    Line,
    Point,
    Series,
    draw,
    nice_ticks,
    path_of,
    readings,
    swatch,
    tick_words,
)

FRAME = Frame("hand", 130.0, 100.0, left=20.0, right=10.0, top=5.0, bottom=15.0)
"""100 to the right and 80 up, from (20, 85)."""
NAN = math.nan


def chart(*series: Series) -> Chart:
    """Shows x from 0 to 10 and y from -4 to 4: 10 units to the right, 10 up for each."""
    return Chart(
        name="one",
        title="A chart",
        summary="What it shows.",
        x=Axis(name="speed", unit="m/s", low=0.0, high=10.0, digits=2),
        y=Axis(name="return", low=-4.0, high=4.0),
        series=series,
    )


def path(picture: str, kind: str) -> str:
    """The data of the first path of a class."""
    found = re.search(rf'<path class="{kind}[^"]*"[^>]* d="([^"]*)"', picture)
    assert found is not None
    return found[1]


@pytest.mark.parametrize(
    ("low", "high", "most", "expected"),
    [
        (0.0, 10.0, 5, [0, 2, 4, 6, 8, 10]),
        (0.0, 10.0, 4, [0, 5, 10]),
        (-161.0, -54.8, 7, [-160, -140, -120, -100, -80, -60]),
        (-0.3, 0.3, 7, [-0.3, -0.2, -0.1, 0, 0.1, 0.2, 0.3]),
        (0.0, 32.6, 12, [0, 5, 10, 15, 20, 25, 30]),
        (99.9, 100.1, 3, [99.9, 100.0, 100.1]),
        (1e6, 3e6, 2, [1e6, 2e6, 3e6]),
    ],
)
def test_ticks_are_round_numbers(low: float, high: float, most: int, expected: list[float]) -> None:
    assert nice_ticks(low, high, most) == pytest.approx(expected)


def test_ticks_have_the_decimals_that_they_need() -> None:
    assert tick_words([0.0, 0.5, 1.0]) == ["0.0", "0.5", "1.0"]
    assert tick_words([-0.02, 0.0, 0.02]) == ["-0.02", "0.00", "0.02"]
    assert tick_words([-50, 0, 50]) == ["-50", "0", "50"]
    assert tick_words(nice_ticks(-0.3, 0.3, 7))[3] == "0.0"
    assert tick_words([3.0]) == ["3"]


def test_a_curve_goes_through_its_points() -> None:
    """(0, -4) is the lower left corner, (10, 4) the upper right, (5, 1) is 50 to the right and 50
    up; all 3 to the right by `aside`; what lies below goes on, to be cut off."""
    points = [Point(0, -4), Point(5, 1), Point(10, 4), Point(10, -6)]
    one = Series(name="a", points=points, colour="maml", style="--", aside=3.0)
    assert path(draw(chart(one), FRAME), "curve") == "M23.0 85.0L73.0 35.0L123.0 5.0L123.0 105.0"
    assert f'stroke-dasharray="{DASHES["--"]}"' in draw(chart(one), FRAME)


def test_a_curve_has_a_gap_where_nothing_is_known() -> None:
    assert path_of([(1, 2), (3, NAN), (5, 6), (7, 8)]) == "M1.0 2.0M5.0 6.0L7.0 8.0"


def test_an_interval_is_a_bar() -> None:
    """From -1 to 2 at x = 4: from 30 to 60 above the lower edge."""
    one = Series(name="a", points=[Point(4, 1, -1, 2), Point(5, 1)], colour="maml", aside=-2.0)
    assert path(draw(chart(one), FRAME), "interval") == "M58.0 55.0V25.0"
    plain = Series(name="a", points=[Point(5, 1)], colour="maml")
    assert 'class="interval' not in draw(chart(plain), FRAME)


def test_markers_are_at_their_points_and_arrows_at_the_edge() -> None:
    """y = 2 is 60 up; -9 lies below and is an arrow at the lower edge; 4 to the right of both."""
    points = [Point(1, 2), Point(3, -9)]
    one = Series(name="a", points=points, colour="maml", marker="s", aside=4.0)
    drawn = path(draw(chart(one), FRAME), "mark full")
    assert drawn == f"M34.0 25.0{MARKS['s']}M54.0 85.0{MARKS['v']}"
    hollow = dataclasses.replace(one, hollow=True)
    assert path(draw(chart(hollow), FRAME), "mark hollow") == drawn


def test_thin_lines_lie_behind() -> None:
    one = Series(name="a", points=[Point(1, 2)], colour="maml", style="-")
    whole = dataclasses.replace(chart(one), behind=[Line([(0, 0), (10, 4)], "random")])
    picture = draw(whole, FRAME)
    assert path(picture, "behind c-random") == "M20.0 45.0L120.0 5.0"
    assert picture.index('class="behind') < picture.index('class="curve')


@pytest.mark.parametrize("frame", [WIDE, NARROW, SMALL])
def test_a_picture_is_whole_and_named(frame: Frame) -> None:
    """Well-formed, with a role, a sentence in place of the picture, axes with units; and no title
    that a browser would show over the points."""
    picture = ET.fromstring(draw(chart(Series(name="a", points=[], colour="maml")), frame))
    assert (picture.get("role"), picture.get("aria-label")) == ("img", "What it shows.")
    assert picture.find("title") is None
    texts = [text.text for text in picture.iter("text")]
    assert "speed (m/s)" in texts
    assert "return" in texts
    assert picture.get("data-box") == " ".join(
        f"{v:g}"
        for v in (frame.left, frame.top, frame.width - frame.right, frame.height - frame.bottom)
    )


def test_ticks_of_ones_own_are_where_they_should_be() -> None:
    x = Axis(name="direction", low=0.0, high=10.0, ticks=[(2.0, "backward"), (8.0, "forward")])
    found = re.findall(
        r'x="([\d.]+)"[^>]*>(\w+ward)<', draw(dataclasses.replace(chart(), x=x), FRAME)
    )
    assert found == [("40.0", "backward"), ("100.0", "forward")]


EVIL = '</svg><script>alert("1")&'


def test_text_stays_text() -> None:
    """Whatever a run is called; in the picture, and in the words for those who do not see it."""
    bad = Axis(name=EVIL, unit=EVIL, low=0.0, high=1.0, ticks=[(0.5, EVIL)])
    one = Series(name=EVIL, points=[Point(0.5, 0.5)], colour="maml", marker="o")
    evil = dataclasses.replace(chart(one), title=EVIL, summary=EVIL, x=bad, y=bad)
    picture = draw(evil, FRAME)
    root = ET.fromstring(picture)
    assert "<script" not in picture
    assert root.get("aria-label") == EVIL
    assert [text.text for text in root.iter("text")].count(EVIL) == 2


def test_readings_are_the_points() -> None:
    """To six digits; without what is not known, and as short as may be."""
    points = [
        Point(1 / 3, -37.47945022583008, -40, -35, "task 3"),
        Point(2, 5, label="here"),
        Point(3, NAN),
        Point(4, 6, 5, 7),
        Point(5, 7),
    ]
    one = Series(name="a", points=points, colour="maml", aside=2.5)
    found = readings(chart(one))
    assert found["series"] == [
        {
            "name": "a",
            "aside": 2.5,
            "points": [
                [0.333333, -37.4795, -40, -35, "task 3"],
                [2, 5, None, None, "here"],
                [4, 6, 5, 7],
                [5, 7],
            ],
        }
    ]
    assert found["x"] == {"name": "speed", "unit": "m/s", "digits": 2, "low": 0, "high": 10}
    json.dumps(found, allow_nan=False)


def test_a_legend_shows_line_and_marker() -> None:
    one = Series(name="a", points=[], colour="oracle", marker="D", style=":", hollow=True)
    root = ET.fromstring(swatch(one))
    assert [p.get("class") for p in root] == ["curve c-oracle", "mark hollow c-oracle"]
    assert root[0].get("stroke-dasharray") == DASHES[":"]
    assert root.get("aria-hidden") == "true"


def test_every_look_can_be_drawn() -> None:
    assert {*MARKERS.values()} <= MARKS.keys()
    assert {*STYLES} == DASHES.keys()
    assert len(set(DASHES.values())) == len(DASHES)


def test_a_logarithmic_axis_gives_equal_ratios_equal_room() -> None:
    """From .01 to 100 over 80 units: 20 a power of ten, from (20, 85) up; 0 is far below."""
    axis = Axis(name="error", low=0.01, high=100.0, log=True)
    series = Series(name="a", points=[Point(0, 1.0)], colour="maml", marker="o")
    log = dataclasses.replace(chart(series), y=axis)
    assert [FRAME.place(log, 0, y)[1] for y in (0.01, 1, 10)] == pytest.approx([85, 45, 25])
    assert FRAME.place(log, 0, 0.0)[1] > 1e5
    assert readings(log)["y"] == {
        **{"name": "error", "unit": "", "digits": 1, "low": 0.01, "high": 100.0, "log": True}
    }
    picture = draw(log, FRAME)
    assert [text for text in re.findall(r'class="tick"[^>]*>([^<]*)<', picture) if "." in text] == [
        *("0.01", "0.1")
    ]
    wide = dataclasses.replace(log, y=dataclasses.replace(axis, low=0.5, high=4.0))
    assert re.findall(r'text-anchor="end">([^<]*)<', draw(wide, FRAME)) == ["0.5", "1", "2"]


def test_what_has_no_bounds_is_an_arrow_at_the_edge() -> None:
    """Above at 5, below at 85; what is no number is nowhere, and no coordinate is not finite."""
    points = [Point(0, math.inf), Point(1, 1e27), Point(2, -math.inf), Point(3, NAN), Point(4, 0)]
    series = Series(name="a", points=points, colour="maml", marker="o", style="-")
    picture = draw(chart(series), FRAME)
    assert "inf" not in picture
    assert "nan" not in picture
    assert path(picture, "mark") == "".join(
        f"M{x} {y}{MARKS[mark]}"
        for x, y, mark in (
            *(("20.0", "5.0", "^"), ("30.0", "5.0", "^"), ("40.0", "85.0", "v")),
            ("60.0", "45.0", "o"),
        )
    )
    assert readings(chart(series))["series"] == [
        {"name": "a", "aside": 0.0, "points": [[1.0, 1e27], [4.0, 0.0]]}
    ]
