"""Several tests side by side, with numbers made by hand."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest

from envs import HalfCheetahDir, Navigation2D
from maml_rl.comparison import MAML, PRETRAINED, Comparison, compare
from maml_rl.errors import InputError
from tests.outcomes import outcome as hand_made

NAVIGATION = Navigation2D(horizon=6)
GOALS = np.array([[0.1, 0.2], [-0.3, 0.4], [0.5, -0.5], [0.0, 0.25]], np.float32)


outcome = functools.partial(hand_made, tasks=GOALS)


def test_figures_by_hand() -> None:
    """Two runs of maml, one oracle of mean 10: (R1 - R0) / (10 - R0), and so on."""
    runs = [
        outcome([[0, 0, 4, 0], [8, 0, 3, 1]], seed=0),
        outcome([[0, 0, 0, 0], [8, 0, 3, 1]], seed=1),
        outcome([[12, 8, 11, 9]], method="oracle"),
    ]
    maml, oracle = compare(runs, NAVIGATION)
    assert (maml.name, maml.seeds, maml.episodes, maml.tasks) == ("maml", (0, 1), 7, 4)
    assert maml.outside_training == 0
    before, after = maml.steps
    assert (before.mean, after.mean) == (0.5, 3.0)
    assert after.gap_closed == pytest.approx(2.5 / 9.5)
    # One of eight fell: 4 to 3 in the first run.
    assert after.share_worse == 0.125
    assert math.isnan(before.gap_closed)
    assert math.isnan(before.share_worse)
    assert (before.by_seed, after.by_seed) == ((1.0, 0.0), (3.0, 3.0))
    # Sorted 0 0 1 1 3 3 8 8: the middle half is 1 1 3 3.
    assert after.interquartile_mean == 2.0
    assert after.sd_over_tasks == pytest.approx(np.std([8, 0, 3, 1]))
    assert after.measures.tolist() == pytest.approx([0.03])
    assert after.interval[0] < 3.0 < after.interval[1]
    # Both runs agree after the step, and not before.
    assert after.interval_over_runs == (2.0, 2.0)
    assert before.interval_over_runs[0] <= before.interquartile_mean
    assert all(map(math.isnan, oracle.steps[0].interval_over_runs))
    assert after.by_task == {}


def test_without_an_oracle_above_there_is_no_gap() -> None:
    """None given, or one on other tasks, or below, or two."""
    run = outcome([[5, 5, 5, 5], [6, 6, 6, 6]])
    for others in (
        [],
        [outcome([[9, 9, 9, 9]], method="oracle", source="paper")],
        [outcome([[5, 5, 5, 5]], method="oracle")],
        # Between two nobody can choose.
        [outcome([[9, 9, 9, 9]], method="oracle", variant=v) for v in ("a", "b")],
    ):
        assert math.isnan(compare([run, *others], NAVIGATION)[0].steps[1].gap_closed)


def test_step_sizes_and_sets_of_tasks_stand_apart() -> None:
    """In the order given; and so do variants, under the same seed."""
    runs = [
        outcome([[1, 1, 1, 1]], step_size=0.1),
        outcome([[2, 2, 2, 2]], step_size=0.2),
        outcome([[3, 3, 3, 3]], step_size=0.1, source="chosen"),
        outcome([[4, 4, 4, 4]], step_size=0.1, variant="b"),
    ]
    found = compare(runs, NAVIGATION)
    assert [(s.name, s.step_size, s.source, s.steps[0].mean) for s in found] == [
        ("maml", 0.1, "test", 1.0),
        ("maml", 0.2, "test", 2.0),
        ("maml", 0.1, "chosen", 3.0),
        ("maml (b)", 0.1, "test", 4.0),
    ]


def test_a_finite_family_is_told_by_task() -> None:
    """Forward and backward on their own, and the interval within each."""
    tasks = np.array([[1.0], [-1.0], [1.0], [-1.0]], np.float32)
    (scores,) = compare([outcome([[100, 1, 102, 3]], tasks=tasks)], HalfCheetahDir(horizon=6))
    step = scores.steps[0]
    assert {name: value for name, (value, _) in step.by_task.items()} == {
        "backward": 2.0,
        "forward": 101.0,
    }
    assert step.by_task["forward"][1].tolist() == [1.01]
    assert step.interval[1] - step.interval[0] <= 2.0


def test_one_chosen_task_of_a_finite_family() -> None:
    """Forward alone, twice: backward is not asked for, and hides no interval."""
    tasks = np.array([[1.0], [1.0]], np.float32)
    (scores,) = compare([outcome([[100, 102]], tasks=tasks)], HalfCheetahDir(horizon=6))
    assert list(scores.steps[0].by_task) == ["forward"]
    assert scores.steps[0].interval == (100.0, 102.0)


def test_tasks_beyond_those_trained_on_are_counted() -> None:
    """Goals in a square of .3 m: two of four lie outside."""
    (scores,) = compare([outcome([[1, 2, 3, 4]], family=Navigation2D(goal_range=0.3))], NAVIGATION)
    assert scores.outside_training == 2


def test_differences_are_taken_task_by_task() -> None:
    """The first method's mean of two runs, 5 2 9 4 and 7 4 11 6, less 5 1 12 6: 1 2 -2 -1; and
    less an oracle's return before any step. Whatever all tasks have in common is not in it."""
    runs = [
        outcome([[0, 0, 0, 0], [5, 2, 9, 4]]),
        outcome([[0, 0, 0, 0], [7, 4, 11, 6]], seed=1),
        outcome([[9, 9, 9, 9], [5, 1, 12, 6]], method="pretrained"),
        outcome([[10, 10, 10, 10]], method="oracle"),
        outcome([[1, 1, 1, 1], [2, 2, 2, 2]], method="random", source="paper"),
    ]
    plain, oracle = Comparison.of(runs, NAVIGATION).differences
    assert (plain.method.method, plain.steps, plain.mean) == ("pretrained", 1, 0.0)
    assert plain.interval[0] == -plain.interval[1] < 0
    assert (oracle.method.method, oracle.steps, oracle.mean) == ("oracle", 1, -4.0)
    # One returns exactly 2 more on every task: there is nothing uncertain in that.
    shifted = [outcome([[0, 0, 0, 0], [7, 3, 14, 8]]), runs[2]]
    (two,) = Comparison.of(shifted, NAVIGATION).differences
    assert (two.mean, two.interval) == (2.0, (2.0, 2.0))


def test_chosen_tasks_have_no_interval() -> None:
    """They are no sample of anything."""
    runs = [
        outcome([[1, 2, 3, 4], [2, 3, 4, 5]], method=m, source="chosen") for m in (MAML, PRETRAINED)
    ]
    found = Comparison.of(runs, NAVIGATION)
    assert all(math.isnan(bound) for bound in found.scores[0].steps[1].interval)
    assert math.isnan(found.differences[0].interval[0])


def test_what_cannot_be_compared_is_refused() -> None:
    """One seed twice, other tasks, other numbers of steps."""
    run = outcome([[1, 1, 1, 1]])
    for other, complaint in (
        (outcome([[2, 2, 2, 2]]), "have the same seed"),
        (outcome([[2, 2, 2, 2]], seed=1, tasks=-GOALS), "the same tasks"),
        (outcome([[2, 2, 2, 2]] * 2, seed=1), "the same number of steps"),
    ):
        with pytest.raises(InputError, match=complaint):
            compare([run, other], NAVIGATION)
