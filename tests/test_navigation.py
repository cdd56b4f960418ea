"""Navigation against a point moved with plain Python floats."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import envs
from envs.family import FamilyError
from envs.navigation import Navigation2D


def test_moves_rewards_and_ending_by_hand() -> None:
    """Goals (.15, -.05), (.1, .3) and (-.1, .05); moves are clipped to .1 on each axis.

    World 0: (5, -.1) moves (.1, -.1), .0707 from the goal; (.045, .045) is .005 off in x and
    in y: over, with reward -.00707. World 1: at (.1, .1) it agrees in x alone. World 2: at
    (-.1, .1), .05 off in y; then (0, -.0398), .0102 off, is not near enough.
    """
    goals = torch.tensor([[0.15, -0.05], [0.1, 0.3], [-0.1, 0.05]])
    moves = torch.tensor(
        [[[5.0, -0.1], [0.1, 7.0], [-3.0, 0.1]], [[0.045, 0.045], [0.0, 0.1], [0.0, -0.0398]]]
    )
    places = [
        [[0.1, -0.1], [0.1, 0.1], [-0.1, 0.1]],
        [[0.145, -0.055], [0.1, 0.2], [-0.1, 0.0602]],
    ]
    distances = [
        [0.05 * math.sqrt(2), 0.2, 0.05],
        [0.005 * math.sqrt(2), 0.1, 0.0102],
    ]
    over = [[False, False, False], [True, False, False]]
    with Navigation2D().make_worlds(3) as worlds:
        assert worlds.reset(goals, np.zeros((3, 0))).tolist() == [[0.0, 0.0]] * 3
        for move, place, distance, ending in zip(moves, places, distances, over, strict=True):
            step = worlds.step(move)
            np.testing.assert_allclose(step.observations, place, atol=1e-7)
            np.testing.assert_allclose(step.rewards, [-d for d in distance], atol=1e-7)
            np.testing.assert_allclose(step.measures[:, 0], distance, atol=1e-7)
            assert step.terminated.tolist() == ending
            assert not step.diverged.any()


def test_a_walk_in_plain_floats() -> None:
    """reward = -sqrt(dx^2 + dy^2) and over where |dx| < .01 and |dy| < .01, after the move."""
    rng = np.random.default_rng(12)
    goals = rng.uniform(-0.05, 0.05, (50, 2)).astype(np.float32)
    moves = rng.uniform(-0.13, 0.13, (6, 50, 2)).astype(np.float32)
    with Navigation2D().make_worlds(50) as worlds:
        worlds.reset(torch.from_numpy(goals), np.zeros((50, 0)))
        steps = [worlds.step(torch.from_numpy(move)) for move in moves]
    endings = 0
    for i, (goal_x, goal_y) in enumerate(goals.tolist()):
        x = y = 0.0
        for step, move in zip(steps, moves[:, i].tolist(), strict=True):
            x += max(-0.1, min(0.1, move[0]))
            y += max(-0.1, min(0.1, move[1]))
            assert step.observations[i].tolist() == pytest.approx([x, y], abs=1e-6)
            dx, dy = x - goal_x, y - goal_y
            assert float(step.rewards[i]) == pytest.approx(-math.hypot(dx, dy), abs=1e-6)
            assert float(step.measures[i, 0]) == pytest.approx(math.hypot(dx, dy), abs=1e-6)
            near = abs(dx) < 0.01 and abs(dy) < 0.01
            assert bool(step.terminated[i]) is near
            endings += near
    assert endings >= 2, "the walk must reach some goals to prove anything"


def test_settings_reach_the_worlds() -> None:
    """Longest move .5 m and radius .2 m: (-.5, .5) is .1 off (-.6, .6) on both axes."""
    family = Navigation2D(max_move=0.5, goal_radius=0.2)
    low, high = family.action_bounds
    assert (low.tolist(), high.tolist()) == ([-0.5, -0.5], [0.5, 0.5])
    with family.make_worlds(1) as worlds:
        worlds.reset(torch.tensor([[-0.6, 0.6]]), np.zeros((1, 0)))
        step = worlds.step(torch.tensor([[-9.0, 9.0]]))
    assert step.observations.tolist() == [[-0.5, 0.5]]
    assert float(step.rewards[0]) == pytest.approx(-0.1 * math.sqrt(2), abs=1e-7)
    assert step.terminated.tolist() == [True]


def test_goals_are_uniform_on_the_square() -> None:
    """U[-.5, .5] on each axis, a quarter in each quadrant; and any other square."""
    goals = Navigation2D().sample_tasks(4000, np.random.default_rng(3))
    assert -0.5 <= goals.min() < -0.499
    assert 0.499 < goals.max() <= 0.5
    right, upper = (goals > 0).T
    quadrants = [(right & upper).mean(), (right & ~upper).mean(), (~right & upper).mean()]
    assert quadrants == pytest.approx([0.25] * 3, abs=0.03)
    assert (abs(goals) < 0.25).mean(axis=0) == pytest.approx([0.5, 0.5], abs=0.03)
    wide = Navigation2D(goal_range=3.0).sample_tasks(200, np.random.default_rng(3))
    assert 2.5 < abs(wide).max() <= 3.0


def test_defaults_and_words() -> None:
    family = Navigation2D()
    assert family.episode_steps == 100
    assert [column.unit for column in family.observation_columns] == ["m", "m"]
    assert family.action_bounds[1].tolist() == [0.1, 0.1]
    assert family.draw_start(np.random.default_rng(0)).shape == (0,)
    assert family.describe_task([0.25, -0.5]) == "goal (0.25, -0.50) m"


@pytest.mark.parametrize(
    ("field", "value"),
    [("horizon", 0), ("goal_range", -0.1), ("max_move", 0.0), ("goal_radius", -0.01)],
)
def test_a_value_out_of_range_is_named(field: str, value: object) -> None:
    with pytest.raises(FamilyError, match=rf"navigation: {field} must be .*got {value}"):
        envs.make("navigation", **{field: value})
