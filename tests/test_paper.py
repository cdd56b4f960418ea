"""The paper's numbers: read as they stand there, and held only against what they measure."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest

import envs
from envs.family import TaskFamily
from maml_rl.comparison import METHODS
from maml_rl.config import shipped_folder
from maml_rl.paper import paper_returns, points_for
from maml_rl.task_sets import PAPER, between, chosen, held_out, papers_own


@dataclass(frozen=True, kw_only=True)
class Renamed(envs.Navigation2D):
    """A family of a user's own that kept the name; its rewards may be others."""

    name: ClassVar[str] = "navigation"


@pytest.mark.parametrize("name", list(PAPER))
def test_every_method_has_its_points_in_order(name: str) -> None:
    """After 0, 1, 2 ... gradient steps; an oracle takes none."""
    points = paper_returns(name)
    assert sorted(points) == sorted(METHODS)
    for method, found in points.items():
        assert [p.steps for p in found] == list(range(len(found)))
        assert (len(found) == 1) == (method == "oracle")
        assert all(p.sd_over_tasks > 0 for p in found)


def test_numbers_are_those_of_the_table() -> None:
    """A few by eye, one of each family; and the file's mean over all of ours is its own."""
    for name, method, steps, mean, sd in (
        ("navigation", "maml", 4, -3.35, 1.92),
        ("half_cheetah_vel", "pretrained", 1, -135.39, 48.57),
        ("half_cheetah_dir", "oracle", 0, 442.69, 27.04),
        ("ant_vel", "maml", 1, 96.74, 66.91),
        ("ant_dir", "random", 3, 26.11, 0.36),
    ):
        assert paper_returns(name)[method][steps] == (steps, mean, sd)
    with (shipped_folder() / "paper" / "returns.csv").open(newline="") as file:
        theirs = [float(row["mean_return"]) for row in csv.DictReader(file)]
    ours = [p.mean for name in PAPER for found in paper_returns(name).values() for p in found]
    assert sorted(ours) == sorted(theirs)
    assert paper_returns("swimmer") == {}


@pytest.mark.parametrize("name", list(PAPER))
def test_they_are_held_against_the_papers_tasks_alone(name: str) -> None:
    family = envs.make(name)
    assert points_for(family, papers_own(family).tasks) == paper_returns(name)
    for count in (40, 6):
        tasks = held_out(family, count).tasks
        # The ant's two directions are 20 each in both, in another order.
        assert points_for(family, tasks) == {}


@pytest.mark.parametrize(
    "family",
    [
        *(envs.make(name, protocol="gymnasium") for name in PAPER if name != "navigation"),
        *(envs.make(name, horizon=99) for name in PAPER),
        envs.make("half_cheetah_dir", control_cost=0.1),
        envs.make("ant_vel", speed_bonus=0.0),
        envs.make("navigation", goal_radius=0.02),
        Renamed(),
    ],
    ids=repr,
)
def test_another_protocol_horizon_or_price_has_none(family: TaskFamily) -> None:
    """On the paper's own tasks: their returns mean something else."""
    assert points_for(family, papers_own(family).tasks) == {}
    assert points_for(family, held_out(family, 40).tasks) == {}


def test_other_tasks_have_none() -> None:
    """Chosen, beyond the range, from another range, or a part of the paper's."""
    speed, goals = envs.make("half_cheetah_vel"), envs.make("navigation")
    near = envs.make("navigation", goal_range=0.2)
    for family, tasks in (
        (speed, between(speed, 2.0, 3.0, 40).tasks),
        (speed, chosen(speed, ["1.0"]).tasks),
        (speed, papers_own(speed).tasks[:39]),
        (goals, -papers_own(goals).tasks),
        (near, held_out(near, 40).tasks),
    ):
        assert points_for(family, tasks) == {}
    assert points_for(near, papers_own(near).tasks) == paper_returns("navigation")


def test_how_training_draws_its_tasks_does_not_matter() -> None:
    """Balanced batches are another training, and the same test."""
    family = envs.make("half_cheetah_dir", balanced=True)
    points = points_for(family, papers_own(family).tasks)
    assert points["maml"][1].mean == 293.19
    backward = np.full((40, 1), -1.0, np.float32)
    assert points_for(family, backward) == {}
