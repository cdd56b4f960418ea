"""The results that the README quotes, against the runs that are kept."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest

from maml_rl.config import load_experiment
from maml_rl.runs import read_metrics

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "experiments" / "results"
README = (ROOT / "README.md").read_text(encoding="utf-8")
QUICKSTARTS = [RESULTS / f"quickstart-seed{seed}" for seed in range(5)]


def summary(run: Path) -> list[dict[str, float]]:
    steps: list[dict[str, float]] = json.loads((run / "evaluation" / "summary.json").read_text())[
        "gradient_steps"
    ]
    return steps


@pytest.mark.parametrize("run", QUICKSTARTS, ids=lambda p: p.name)
def test_quickstart_adapts_visibly(run: Path) -> None:
    """One step gains more than both half-widths, and .2 m/s the wanted way in each direction."""
    before, after = summary(run)[:2]
    assert after["return"] - before["return"] > before["half_width_95"] + after["half_width_95"]
    with (run / "evaluation" / "evaluation.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for direction in ("-1.0", "1.0"):
        speed = [
            [
                float(r["velocity_mean"])
                for r in rows
                if r["task_direction"] == direction and r["gradient_steps"] == steps
            ]
            for steps in ("0", "1")
        ]
        assert len(speed[0]) == len(speed[1]) == 20
        assert sum(speed[1]) / 20 - sum(speed[0]) / 20 >= 0.2


def test_the_full_run_learned() -> None:
    """At least 60 iterations of 40 x 20 x 200 x 2 steps; before stays below 0, after beats 60."""
    run = RESULTS / "half_cheetah_dir-seed0"
    experiment = load_experiment(run / "config.yaml")
    assert (experiment.sampling.tasks, experiment.sampling.episodes) == (40, 20)
    metrics = read_metrics(run / "metrics.csv")
    assert len(metrics["iteration"]) >= 60
    assert metrics["env_steps"][0] == 40 * 20 * 200 * 2
    assert max(metrics["return_0"]) < 0
    assert sum(metrics["return_1"][-5:]) / 5 > 60


def test_the_readmes_numbers_are_those_of_the_runs() -> None:
    """The quickstart's table, number by number, and the full run's returns."""
    for step in summary(QUICKSTARTS[0]):
        assert f"{step['return']:.1f} ± {step['half_width_95']:.1f}" in README
    for step in summary(RESULTS / "half_cheetah_dir-seed0"):
        assert re.search(rf"{step['return']:.1f} ± {step['half_width_95']:.1f}", README)
