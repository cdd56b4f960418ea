"""`maml-rl speed`: figures are complete and are ratios of times really taken."""

from __future__ import annotations

import json

import pytest
import torch

from maml_rl.cli import run


@pytest.mark.slow
def test_every_row_of_the_goals_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    """JSON with a value, unit and goal a row; at a cut scale no goal of time is judged."""
    assert run(["speed", "--scale", "0.05", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert [f["unit"] for f in figures] == [
        *("of bare physics speed", "x bare physics time", "s"),
        *("s", "GB", "GB", "% of its time", "s", "of its time"),
        *("x a loop over tasks", "x a loop over tasks"),
        *("of second order's", "of second order's"),
    ]
    assert all(f["value"] >= 0 for f in figures)
    assert 0 < figures[0]["value"] < 1.5
    assert figures[1]["value"] > 1
    assert figures[0]["met"] is None


@pytest.mark.slow
@pytest.mark.parametrize("physics", ["cpu", "warp"])
def test_a_device_is_measured_case_by_case(
    physics: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The cases with goals come first; what time does not suffice for is left out, and said."""
    words = ["speed", "--physics", physics, "--scale", "0.03", "--seconds", "0"]
    assert run([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []
    assert run([*words, "--seconds", "1e-9"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"left out: half_cheetah_dir, physics {physics}, 20 worlds, for want of time" in said
    assert run([*words[:-1], "1", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert {f["case"] for f in figures} == {f"half_cheetah_dir, physics {physics}, 20 worlds"}
    assert [(f["what"], f["unit"]) for f in figures] == [
        ("bare physics", "control steps/s"),
        ("sampling", "of bare physics speed"),
        ("update", "s"),
        ("meta-iteration", "s"),
    ]
    assert all(f["value"] > 0 and f["met"] is None for f in figures)
    for part in ("advantages", "inner step", "linearisation", "10 Fisher products", "line search"):
        assert part in figures[2]["detail"]


def test_a_device_that_is_not_there_is_not_measured(capsys: pytest.CaptureFixture[str]) -> None:
    """One sentence and exit 2; so is a limit of time where nothing is to be left out."""
    if not torch.cuda.is_available():
        assert run(["speed", "--device", "cuda"]) == 2
        assert "device cuda is not there" in capsys.readouterr().err
    assert run(["speed", "--seconds", "3"]) == 2
    assert "--seconds goes with" in capsys.readouterr().err
