"""Tests of several policies side by side: what each gains by adapting, and how sure that is.

All meet the same tasks, starts and seeds, so their figures are paired.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from envs.family import TaskFamily
from maml_rl.errors import InputError
from maml_rl.evaluate import Evaluation
from maml_rl.scores import (
    gap_closed,
    interquartile_mean,
    interval_over_runs,
    interval_over_tasks,
    share_worse,
)

ORACLE = "oracle"
"""The method that knows its task, and whose return before any step is the gap's far side."""


@dataclass(frozen=True)
class Outcome:
    """One policy's test."""

    method: str
    """maml, pretrained, oracle or random."""
    variant: str
    """Tells apart runs of one method that were trained with different settings; often ""."""
    seed: int
    """Of its training run."""
    step_size: float
    """Of the first update."""
    source: str
    """Where the tasks come from; see `TaskSet.source`."""
    evaluation: Evaluation
    outside_training: npt.NDArray[np.bool_]
    """(T,): which of the tasks its training never draws."""


@dataclass(frozen=True)
class StepScores:
    """What the runs of one method reach after one number of gradient steps."""

    steps: int
    mean: float
    """Over tasks and runs, undiscounted return."""
    interval: tuple[float, float]
    """95 %, of the mean, over tasks."""
    sd_over_tasks: float
    interquartile_mean: float
    """Over tasks and runs."""
    interval_over_runs: tuple[float, float]
    """95 %, of the interquartile mean; NaN for a single run."""
    share_worse: float
    """Share of tasks that got worse by adapting."""
    gap_closed: float
    """(R_k - R_0) / (oracle - R_0); NaN without an oracle above R_0."""
    measures: npt.NDArray[np.float64]
    """(Q,): the family's measures the wanted way, mean over tasks and runs."""
    by_task: Mapping[str, tuple[float, npt.NDArray[np.float64]]]
    """For a family of finitely many tasks: return and measures (Q,) of each."""


@dataclass(frozen=True)
class MethodScores:
    """One method with one step size on one set of tasks."""

    method: str
    variant: str
    step_size: float
    source: str
    seeds: tuple[int, ...]
    tasks: int
    """T."""
    outside_training: int
    """How many of them training never draws."""
    episodes: int
    """Behind every task's return, in each run."""
    steps: tuple[StepScores, ...]

    @property
    def name(self) -> str:
        """The method in words, with the variant where there are several."""
        return f"{self.method} ({self.variant})" if self.variant else self.method


def compare(tested: Sequence[Outcome], family: TaskFamily) -> list[MethodScores]:
    """Return the scores of every method, step size and set of tasks, in the order given.

    Raises:
        InputError: if two runs of one method have the same seed, or were tested on other tasks.
    """
    groups: dict[tuple[str, str, float, str], list[Outcome]] = {}
    for one in tested:
        groups.setdefault((one.method, one.variant, one.step_size, one.source), []).append(one)
    # Before any step, so its step size does not matter; the last of several variants holds.
    oracles = {
        source: stack(runs)[0].mean()
        for (method, _, _, source), runs in groups.items()
        if method == ORACLE
    }
    scores = []
    for (method, variant, step_size, source), runs in groups.items():
        seeds = [run.seed for run in runs]
        if len(set(seeds)) < len(seeds):
            raise InputError(f"two runs of {method} have the same seed: {sorted(seeds)}")
        oracle = float(oracles.get(source, math.nan))
        returns = stack(runs)
        scores.append(
            MethodScores(
                method,
                variant,
                step_size,
                source,
                tuple(seeds),
                returns.shape[2],
                int(runs[0].outside_training.sum()),
                runs[0].evaluation.episodes,
                tuple(
                    score_step(runs, returns, step, family, oracle) for step in range(len(returns))
                ),
            )
        )
    return scores


def stack(runs: Sequence[Outcome]) -> npt.NDArray[np.float64]:
    """Return the returns of runs of one method, (n + 1, R, T).

    Raises:
        InputError: if they were tested on other tasks, or by other numbers of steps.
    """
    first = runs[0].evaluation
    for run in runs:
        same = run.evaluation.returns.shape == first.returns.shape
        if not (same and np.array_equal(run.evaluation.tasks, first.tasks)):
            raise InputError(
                f"runs of {run.method} with seeds {runs[0].seed} and {run.seed} were not tested on "
                "the same tasks by the same number of steps"
            )
    return np.stack([run.evaluation.returns for run in runs], axis=1)


def score_step(
    runs: Sequence[Outcome],
    returns: npt.NDArray[np.float64],
    step: int,
    family: TaskFamily,
    oracle: float,
) -> StepScores:
    """Return the scores after one number of gradient steps; `returns` is (n + 1, R, T)."""
    first = runs[0].evaluation
    groups = [(name, mask) for name, mask in first.groups(family) if mask.any()]
    now, before = returns[step], returns[0]
    measures = np.mean([run.evaluation.measures[step] for run in runs], axis=0)
    return StepScores(
        steps=step,
        mean=float(now.mean()),
        interval=interval_over_tasks(now.mean(0), [mask for _, mask in groups]),
        sd_over_tasks=float(now.mean(0).std()),
        interquartile_mean=float(interquartile_mean(now.reshape(-1))),
        interval_over_runs=interval_over_runs(now),
        share_worse=share_worse(before, now),
        gap_closed=gap_closed(float(before.mean()), float(now.mean()), oracle),
        measures=measures.mean(0),
        by_task={
            name: (float(now[:, mask].mean()), measures[mask].mean(0)) for name, mask in groups
        },
    )
