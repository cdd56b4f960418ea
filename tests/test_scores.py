"""Figures of merit, against numbers done by hand and intervals that are known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from maml_rl.scores import (
    gap_closed,
    interquartile_mean,
    interval_over_runs,
    interval_over_tasks,
    share_worse,
)

RNG = np.random.default_rng(5)


@pytest.mark.parametrize(
    ("values", "middle"),
    [
        ([7.0], 7.0),
        ([1.0, 5.0, 3.0], 3.0),  # a quarter of 3 is none
        ([100.0, 2.0, 4.0, -50.0], 3.0),
        ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 800.0], 4.5),  # 3 4 5 6
        ([0.0, 1.0, 2.0, 9.0, 9.0], 4.0),  # 1 2 9
    ],
)
def test_the_interquartile_mean_is_that_of_the_middle_half(
    values: list[float], middle: float
) -> None:
    """Order does not matter; a quarter at each end is left out, rounded down."""
    assert float(interquartile_mean(np.array(values))) == middle
    batch = np.stack([np.array(values), 10 + np.array(values)[::-1]])
    assert interquartile_mean(batch).tolist() == [middle, 10 + middle]


def test_the_interval_over_tasks_is_that_of_the_normal_law() -> None:
    """400 values: mean +- 1.96 sd / sqrt(400), to a tenth of its width; the same at every call."""
    values = RNG.normal(3.0, 8.0, 400)
    low, high = interval_over_tasks(values)
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.1 * half)
    assert interval_over_tasks(values) == (low, high)


def test_repetitions_of_a_task_are_resampled_within_it() -> None:
    """Two tasks 100 apart, with a spread of 1 in each: the interval knows only the spread of 1."""
    forward = np.arange(40) < 20
    values = np.where(forward, 100.0, 0.0) + RNG.normal(0.0, 1.0, 40)
    low, high = interval_over_tasks(values, [forward, ~forward])
    assert high - low == pytest.approx(2 * 1.96 / math.sqrt(40), rel=0.3)
    wide = interval_over_tasks(values)
    assert wide[1] - wide[0] > 20
    # Groups of unequal size keep their sizes.
    few = np.arange(40) < 10
    low, high = interval_over_tasks(np.where(few, 100.0, 0.0), [few, ~few])
    assert (low, high) == (25.0, 25.0)


def test_one_task_has_no_interval() -> None:
    assert all(map(math.isnan, interval_over_tasks(np.array([1.0]))))
    single = np.array([True, False, False])
    assert all(map(math.isnan, interval_over_tasks(np.arange(3.0), [single, ~single])))


def test_runs_are_resampled_within_each_task() -> None:
    """Tasks 1000 apart and runs that agree: no spread at all. One run has no interval."""
    tasks = np.arange(0.0, 8000.0, 1000.0)
    low, high = interval_over_runs(np.array([tasks, tasks, tasks]))
    assert low == high == tasks[2:6].mean()
    assert all(map(math.isnan, interval_over_runs(tasks[None])))
    noisy = tasks + RNG.normal(0.0, 1.0, (10, 8))
    low, high = interval_over_runs(noisy)
    # The middle half, 40 of 80 numbers of spread 1.
    assert high - low == pytest.approx(2 * 1.96 / math.sqrt(40), rel=0.4)


def test_the_share_of_tasks_that_got_worse() -> None:
    """Equal is not worse."""
    assert share_worse(np.array([1.0, 2.0, 3.0, 4.0]), np.array([0.0, 2.0, 5.0, 3.0])) == 0.5


def test_the_gap_to_the_oracle() -> None:
    """The paper's navigation: (-11.7 + 40.4) / (-2.3 + 40.4) = .75; none where R_0 is above."""
    assert gap_closed(-40.4, -11.7, -2.3) == pytest.approx(0.753, abs=1e-3)
    assert gap_closed(0.0, 5.0, 4.0) == 1.25
    assert math.isnan(gap_closed(4.0, 5.0, 4.0))
