"""`maml-rl speed`: figures are complete and are ratios of times really taken."""

from __future__ import annotations

import json

import pytest

from maml_rl.cli import run


@pytest.mark.slow
def test_every_row_of_the_goals_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    """JSON with a value, unit and goal a row; at a cut scale no goal of time is judged."""
    assert run(["speed", "--scale", "0.05", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert [f["unit"] for f in figures] == [
        *("of bare physics speed", "x bare physics time", "s"),
        *("s", "GB", "GB", "% of its time", "s"),
        *("x a loop over tasks", "x a loop over tasks"),
        *("of second order's", "of second order's"),
    ]
    assert all(f["value"] >= 0 for f in figures)
    assert 0 < figures[0]["value"] < 1.5
    assert figures[1]["value"] > 1
    assert figures[0]["met"] is None
