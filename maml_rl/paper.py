"""The numbers of Finn et al. 2017 that a result may be held against."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

import envs
from envs.family import TaskFamily
from maml_rl.config import shipped_folder
from maml_rl.task_sets import PAPER, Tasks, papers_own


class Point(NamedTuple):
    """The paper's mean return after some gradient steps."""

    steps: int
    mean: float
    sd_over_tasks: float


def paper_returns(name: str) -> dict[str, list[Point]]:
    """Return the paper's points of a family by method; none where it has none."""
    points: dict[str, list[Point]] = {}
    with (shipped_folder() / "paper" / "returns.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            # The one place where the paper's names become ours.
            if row["task_family"].replace("-", "_") == name:
                mean, sd = float(row["mean_return"]), float(row["sd_over_tasks"])
                points.setdefault(row["method"], []).append(
                    Point(int(row["gradient_steps"]), mean, sd)
                )
    return points


def points_for(family: TaskFamily, tasks: Tasks) -> Mapping[str, list[Point]]:
    """Return the paper's points that returns on these tasks may be held against, by method.

    None unless family, protocol and every setting that returns depend on are the paper's, and the
    tasks are its own 40.
    """
    if family.name not in PAPER or not family.comparable(envs.make(family.name)):
        return {}
    same = np.array_equal(tasks, papers_own(family).tasks)
    return paper_returns(family.name) if same else {}
