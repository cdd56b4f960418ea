"""Figures of merit over test tasks and runs, and how sure they are.

Pure functions of arrays of returns. Intervals are percentile bootstraps, drawn from one fixed seed,
so that the same returns always give the same interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

RESAMPLES = 2000
BOOTSTRAP_SEED = 2108_13264
CENTRAL = (2.5, 97.5)
"""Percentiles between which 95 % of the resampled figures lie."""


def interquartile_mean(values: Floats) -> Floats:
    """Return the mean of the middle half of the values along the last axis.

    A quarter, rounded down, is left out at each end (Agarwal et al. 2021, arXiv:2108.13264).

    Args:
        values: (..., N), N > 0.

    Returns:
        (...).
    """
    count = values.shape[-1]
    cut = count // 4
    middle: Floats = np.sort(values, axis=-1)[..., cut : count - cut].mean(-1)
    return middle


def interval_over_tasks(values: Floats, groups: Sequence[Bools] = ()) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the mean over tasks.

    Args:
        values: (T,) one figure a task, such as a return, or the difference of two.
        groups: masks (T,) of the repetitions of each task, where a family has finitely many; they
            are resampled within each, since another draw would have each as often.

    Returns:
        Low and high; NaN where a group has a single task, of whose spread nothing is known.
    """
    strata = [np.flatnonzero(mask) for mask in groups] or [np.arange(len(values))]
    if any(len(stratum) < 2 for stratum in strata):
        return math.nan, math.nan
    rng = np.random.default_rng(BOOTSTRAP_SEED)
    drawn = [
        stratum[rng.integers(0, len(stratum), (RESAMPLES, len(stratum)))] for stratum in strata
    ]
    low, high = np.percentile(values[np.concatenate(drawn, 1)].mean(-1), CENTRAL)
    return float(low), float(high)


def interval_over_runs(values: Floats) -> tuple[float, float]:
    """Return the 95 % stratified bootstrap interval of the interquartile mean over runs.

    Runs are resampled with replacement for every task on its own (Agarwal et al. 2021, section
    4.1), and the mean is taken over all runs and tasks together. There a run is one of one task;
    here one training is tested on all tasks, so what one seed does better than another on every
    task averages out, and is not in this interval: look at each seed's mean beside it.

    Args:
        values: (R, T) one figure a run and task.

    Returns:
        Low and high; NaN for a single run.
    """
    runs, tasks = values.shape
    if runs < 2:
        return math.nan, math.nan
    rng = np.random.default_rng(BOOTSTRAP_SEED)
    drawn = rng.integers(0, runs, (RESAMPLES, runs, tasks))
    resampled = np.take_along_axis(values[None], drawn, axis=1)
    low, high = np.percentile(interquartile_mean(resampled.reshape(RESAMPLES, -1)), CENTRAL)
    return float(low), float(high)


def share_worse(before: Floats, after: Floats) -> float:
    """Return the share of figures whose return fell by adapting, of any equal shapes."""
    return float((after < before).mean())


def gap_closed(before: float, after: float, oracle: float) -> float:
    """Return (R_k - R_0) / (oracle - R_0); NaN where the oracle is not above R_0."""
    return (after - before) / (oracle - before) if oracle > before else math.nan
