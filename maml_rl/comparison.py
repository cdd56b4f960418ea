"""Tests of several policies side by side: what each gains by adapting, and how sure that is.

All meet the same tasks, starts and seeds, so their figures are paired.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from envs.family import TaskFamily
from maml_rl.errors import InputError
from maml_rl.evaluate import Evaluation
from maml_rl.sampler import Count
from maml_rl.scores import (
    gap_closed,
    interquartile_mean,
    interval_over_runs,
    interval_over_tasks,
    share_worse,
)
from maml_rl.task_sets import CHOSEN

Method = Literal["maml", "pretrained", "oracle", "random"]
METHODS: tuple[Method, ...] = get_args(Method)
"""What a policy may be, in the order of tables and figures."""
MAML, PRETRAINED, ORACLE, RANDOM = METHODS

Key = tuple[str, str, float, str]
"""What tells apart the rows of a comparison: method, variant, step size and source of tasks."""


def method_name(method: str, variant: str) -> str:
    """Return what a method is called: with its variant, where it has several."""
    return f"{method} ({variant})" if variant else method


@dataclass(frozen=True)
class Outcome:
    """One policy's test."""

    method: Method
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

    @property
    def key(self) -> Key:
        """Whose seeds' tests are taken together."""
        return self.method, self.variant, self.step_size, self.source


@dataclass(frozen=True)
class StepScores:
    """What the runs of one method reach after one number of gradient steps."""

    steps: int
    mean: float
    """Over tasks and runs, undiscounted return."""
    interval: tuple[float, float]
    """95 %, of the mean, over tasks; NaN for chosen tasks, which are no sample."""
    by_seed: tuple[float, ...]
    """Mean over tasks of each run."""
    sd_over_tasks: float
    interquartile_mean: float
    """Over tasks and runs."""
    interval_over_runs: tuple[float, float]
    """95 %, of the interquartile mean; NaN for a single run."""
    share_worse: float
    """Share of tasks of all runs that got worse by adapting; NaN before any step."""
    gap_closed: float
    """(R_k - R_0) / (oracle - R_0); NaN before any step, and without one oracle above R_0."""
    measures: npt.NDArray[np.float64]
    """(Q,): the family's measures the wanted way, mean over tasks and runs."""
    by_task: Mapping[str, tuple[float, npt.NDArray[np.float64]]]
    """For a family of finitely many tasks: return and measures (Q,) of each."""


@dataclass(frozen=True)
class MethodScores:
    """One method with one step size on one set of tasks."""

    method: Method
    variant: str
    step_size: float
    source: str
    seeds: tuple[int, ...]
    tasks: int
    """T."""
    outside_training: int
    """How many of them training never draws."""
    episodes: int
    """Behind every task's return, in each run; more where they are counted in steps."""
    count: Count
    steps: tuple[StepScores, ...]

    @property
    def key(self) -> Key:
        """That of the tests it comes from."""
        return self.method, self.variant, self.step_size, self.source

    @property
    def name(self) -> str:
        """The method in words, with the variant where there are several."""
        return method_name(self.method, self.variant)

    @property
    def step_size_words(self) -> str:
        """The step size, "" where no gradient step is taken."""
        return f"{self.step_size:g}" if len(self.steps) > 1 else ""


@dataclass(frozen=True)
class Difference:
    """How much more one policy returns than another after as many gradient steps, task by task."""

    method: MethodScores
    """Whose return is taken off that of the first method."""
    steps: int
    mean: float
    """Over tasks, of the runs' means."""
    interval: tuple[float, float]
    """95 %, over tasks: 0 outside of it, the two can be told apart."""


@dataclass(frozen=True)
class Comparison:
    """What tests side by side come to."""

    scores: list[MethodScores]
    differences: list[Difference]
    """Of the first method from each other one."""

    @classmethod
    def of(cls, tested: Sequence[Outcome], family: TaskFamily) -> Comparison:
        """Score tests.

        Raises:
            InputError: if two runs of one method have the same seed, or were tested on other tasks.
        """
        scores = compare(tested, family)
        return cls(scores, differences(tested, scores, family))


def grouped(tested: Sequence[Outcome]) -> dict[Key, list[Outcome]]:
    """Return the tests of each method's runs, in the order given."""
    groups: dict[Key, list[Outcome]] = {}
    for one in tested:
        groups.setdefault(one.key, []).append(one)
    return groups


def compare(tested: Sequence[Outcome], family: TaskFamily) -> list[MethodScores]:
    """Return the scores of every method, step size and set of tasks, in the order given.

    Raises:
        InputError: if two runs of one method have the same seed, or were tested on other tasks.
    """
    groups = grouped(tested)
    scores = []
    for (method, variant, step_size, source), runs in groups.items():
        seeds = [run.seed for run in runs]
        if len(set(seeds)) < len(seeds):
            raise InputError(f"two runs of {method} have the same seed: {sorted(seeds)}")
        # Before any step, so its step size does not matter; between two nobody can choose.
        oracles = {
            (key[1], float(stack(found)[0].mean()))
            for key, found in groups.items()
            if (key[0], key[3]) == (ORACLE, source)
        }
        oracle = oracles.pop()[1] if len(oracles) == 1 else math.nan
        returns = stack(runs)
        scores.append(
            MethodScores(
                runs[0].method,
                variant,
                step_size,
                source,
                tuple(seeds),
                returns.shape[2],
                int(runs[0].outside_training.sum()),
                runs[0].evaluation.episodes,
                runs[0].evaluation.count,
                tuple(
                    score_step(runs, returns, step, family, oracle) for step in range(len(returns))
                ),
            )
        )
    return scores


def differences(
    tested: Sequence[Outcome], scores: Sequence[MethodScores], family: TaskFamily
) -> list[Difference]:
    """Return how much more the first method returns than each other that adapts.

    All meet the same tasks, starts and noise, so the difference is known better than either.
    """
    groups = grouped(tested)
    first = scores[0]
    ours = stack(groups[first.key]).mean(1)
    result = []
    for other in scores[1:]:
        if other.source != first.source:
            continue
        theirs = stack(groups[other.key]).mean(1)
        # From the first step on; a policy that takes none stays what it is.
        for step in range(1, len(first.steps)):
            if len(theirs) == 1 or step < len(theirs):
                values = ours[step] - theirs[min(step, len(theirs) - 1)]
                found = interval(values, groups[first.key][0], family)
                result.append(Difference(other, step, float(values.mean()), found))
    return result


def interval(
    values: npt.NDArray[np.float64], one: Outcome, family: TaskFamily
) -> tuple[float, float]:
    """Return the 95 % interval of a mean over the tasks (T,) of a test; NaN for chosen ones."""
    if one.source == CHOSEN:
        return math.nan, math.nan
    masks = [mask for _, mask in one.evaluation.groups(family)]
    return interval_over_tasks(values, [mask for mask in masks if mask.any()])


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
    means = now.mean(0)
    return StepScores(
        steps=step,
        mean=float(now.mean()),
        interval=interval(means, runs[0], family),
        by_seed=tuple(now.mean(1).tolist()),
        sd_over_tasks=float(means.std()),
        interquartile_mean=float(interquartile_mean(now.reshape(-1))),
        interval_over_runs=interval_over_runs(now),
        share_worse=share_worse(before, now) if step else math.nan,
        gap_closed=gap_closed(float(before.mean()), float(now.mean()), oracle)
        if step
        else math.nan,
        measures=measures.mean(0),
        by_task={
            name: (float(now[:, mask].mean()), measures[mask].mean(0)) for name, mask in groups
        },
    )
