"""The numbers of Finn et al. 2017, sections 5.1 and 5.2, that a test may be held against."""

from __future__ import annotations

import csv
import math
from typing import NamedTuple

from maml_rl.config import shipped_folder
from maml_rl.supervised.config import SupervisedExperiment
from maml_rl.supervised.tasks import Problem


class PaperScore(NamedTuple):
    """The paper's score after some gradient steps."""

    method: str
    steps: int
    mean: float
    """Accuracy, as a share, or mean squared error."""
    half_width: float
    """Of its 95 % interval; NaN where it has none."""


def paper_scores(experiment: SupervisedExperiment[Problem], shots: int) -> list[PaperScore]:
    """Return the paper's scores for the kind of task that an experiment is tested on.

    Args:
        experiment: its problem and network.
        shots: examples adapted to.
    """
    problem = experiment.data
    ways = f"{problem.outputs}way-" if problem.classifies else ""
    benchmark = f"{problem.name}-{ways}{shots}shot"
    fully_connected = problem.classifies and experiment.network.kind == "mlp"
    found = []
    with (shipped_folder() / "paper" / "supervised.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            method, plain = row["method"], row["method"].removesuffix("-no-conv")
            if row["benchmark"] != benchmark or (method != plain) != fully_connected:
                continue
            unit = 100.0 if row["metric"] == "accuracy" else 1.0
            half = float(row["ci95"]) / unit if row["ci95"] else math.nan
            # The one place where the paper's names become ours.
            name = {"first-order-maml": "first-order maml"}.get(plain, plain)
            value = float(row["value"]) / unit
            found.append(PaperScore(name, int(row["gradient_steps"]), value, half))
    return found
