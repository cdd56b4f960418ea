"""What figures and charts share: colours that can be seen, and numbers by hand."""

from __future__ import annotations

import re

import numpy as np
import pytest

from envs import HalfCheetahDir, HalfCheetahVel, Navigation2D
from maml_rl.looks import (
    OTHERS,
    SHADES,
    colour,
    curve_name,
    phases,
    places,
    readable_range,
    thick,
)
from maml_rl.report.sheet import FILES


def luminance(shade: str) -> float:
    """Relative luminance of "#rrggbb", as WCAG 2 defines it."""
    parts = [int(shade[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def page_colours() -> tuple[dict[str, str], dict[str, str]]:
    """The style sheet's colours in the light and in the dark scheme."""
    light, dark, *_ = re.findall(r":root \{[^}]*\}", (FILES / "report.css").read_text())
    found = [dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", text)) for text in (light, dark)]
    return found[0], found[1]


def test_contrast_is_known_for_black_and_white() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)


def test_colours_can_be_seen_in_both_schemes() -> None:
    """WCAG 2.2, AA: 4.5:1 for text, 3:1 for what is drawn, on the page and on raised parts."""
    for scheme, shades in zip(page_colours(), ("light", "dark"), strict=True):
        grounds = (scheme["ground"], scheme["raised"])
        for text in ("text", "muted", "link", "warn"):
            assert min(contrast(scheme[text], g) for g in grounds) >= 4.5, (shades, text)
        for name, shade in SHADES.items():
            assert contrast(getattr(shade, shades), scheme["ground"]) >= 3, (shades, name)


def test_a_methods_variants_have_colours_of_their_own() -> None:
    assert colour("maml", 0) == "maml"
    assert [colour("maml", number) for number in (1, 2, 3, 4)] == [*OTHERS, OTHERS[0]]


def test_a_running_mean_is_over_five_iterations() -> None:
    """0, 1, ... 9 become 0, .5, 1, 1.5, 2, 3, ... 7."""
    across, up = thick([(np.arange(10.0), np.arange(10.0)), (np.arange(12.0),) * 2])
    assert across.tolist() == list(range(10))
    assert up.tolist() == [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]


def test_a_running_mean_leaves_out_what_is_not_known() -> None:
    """Of nan, nan, 3, 5: nothing, nothing, 3, 4."""
    _, up = thick([(np.arange(4.0), np.array([np.nan, np.nan, 3.0, 5.0]))])
    assert np.isnan(up[:2]).all()
    assert up[2:].tolist() == [3.0, 4.0]


def test_a_range_holds_what_is_needed_and_what_is_near() -> None:
    """0 to 100 are needed; -50 is near, -900 is not; 6 % of 150 at either end."""
    low, high = readable_range([0.0, 100.0], [-900.0, -50.0])
    assert (low, high) == pytest.approx((-59.0, 109.0))


def test_places_of_tasks() -> None:
    """A speed is its own, a goal's is its distance, directions are spread about 0 and 1."""
    speeds = np.array([[0.5], [1.5]], np.float32)
    assert places(HalfCheetahVel(), speeds).tolist() == [0.5, 1.5]
    assert places(Navigation2D(), np.array([[0.3, -0.4]], np.float32)) == pytest.approx([0.5])
    both = np.array([[1.0], [-1.0], [1.0], [-1.0]], np.float32)
    assert places(HalfCheetahDir(), both) == pytest.approx([0.7, -0.3, 1.3, 0.3])


def test_learning_curves_are_named_by_their_phase() -> None:
    names = ("iteration", "return_0", "return_0_sd", "return_1", "return_1_sd", "kl")
    assert phases(dict.fromkeys(names, (0.0,))) == 2
    assert [curve_name("maml", phase, 3) for phase in range(3)] == [
        *("maml, before", "maml, after 1 step", "maml, after 2 steps")
    ]
    assert curve_name("oracle", 0, 1) == "oracle"
