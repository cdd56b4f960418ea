"""Which tasks a policy is tested on: held out, the paper's, chosen, or beyond those trained on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from envs.family import FamilyError, TaskFamily
from maml_rl.sampler import task_generator
from maml_rl.seeds import TEST, TEST_SEED, VALIDATION

CHOSEN = "chosen"
"""The source of tasks that somebody chose one by one; they are no sample of anything."""

Tasks = npt.NDArray[np.float32]


@dataclass(frozen=True)
class TaskSet:
    """Test tasks and where they come from."""

    source: str
    """In evaluation.csv: "test", "validation", "paper", "chosen" or "from LOW to HIGH"."""
    tasks: Tasks
    """(T, P)."""
    stream: int = TEST
    """Of the seeds of their episodes."""


def held_out(family: TaskFamily, count: int) -> TaskSet:
    """Return the test tasks: always the same, and never drawn in training.

    A family with finitely many tasks uses each equally often, so `count` is rounded up.
    """
    return TaskSet("test", drawn_from(TEST, family, count))


def validation(family: TaskFamily, count: int) -> TaskSet:
    """Return tasks to choose settings on: always the same, not those of training or of the test.

    Where a family has finitely many they are the same tasks, with other episodes.
    """
    return TaskSet("validation", drawn_from(VALIDATION, family, count), VALIDATION)


def drawn_from(stream: int, family: TaskFamily, count: int) -> Tasks:
    """Return the first tasks of a stream of seeds, (count, P), or each of finitely many in turn."""
    finite = family.finite_tasks
    if finite is not None:
        return np.tile(finite, (-(-count // len(finite)), 1))
    return family.sample_tasks(count, task_generator(stream, TEST_SEED, 0))


def _uniform(low: float, high: float, *shape: int) -> Callable[[], npt.NDArray[np.float64]]:
    return lambda: np.random.RandomState(1).uniform(low, high, shape)


def _directions(forward: int, backward: int) -> Callable[[], npt.NDArray[np.float64]]:
    return lambda: np.repeat([[1.0], [-1.0]], [forward, backward], axis=0)


PAPER: Mapping[str, Callable[[], npt.NDArray[np.float64]]] = {
    "navigation": _uniform(-0.5, 0.5, 40, 2),
    "half_cheetah_vel": _uniform(0.0, 2.0, 40, 1),
    "half_cheetah_dir": _directions(18, 22),
    "ant_vel": _uniform(0.0, 3.0, 40, 1),
    "ant_dir": _directions(20, 20),
}
"""The 40 tasks of the paper's own tests, by family."""


def papers_own(family: TaskFamily) -> TaskSet:
    """Return the 40 tasks that the paper's numbers were measured on.

    They are not typical: the mean speed of half_cheetah_vel's is .92 of [0, 2].

    Raises:
        FamilyError: if the paper has none for this family.
    """
    if family.name not in PAPER:
        raise FamilyError(
            f"the paper has no tasks for {family.name}; it has for {', '.join(PAPER)}"
        )
    return TaskSet("paper", PAPER[family.name]().astype(np.float32))


def chosen(family: TaskFamily, texts: Sequence[str]) -> TaskSet:
    """Return tasks given as text, the columns of one task joined by commas: "0.3,-0.2".

    Raises:
        FamilyError: for one that is no task of the family.
    """
    return TaskSet(CHOSEN, np.stack([parse_task(family, text) for text in texts]))


def parse_task(family: TaskFamily, text: str) -> Tasks:
    """Return one task (P,) from its text: numbers, or of finitely many one in words, "forward".

    Raises:
        FamilyError: if it is none.
    """
    finite = family.finite_tasks
    tasks = [] if finite is None else [family.check_task(task) for task in finite]
    in_words = {family.describe_task(task): task for task in tasks}
    if text in in_words:
        return in_words[text]
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError as error:
        if in_words:
            raise FamilyError(
                f"{family.name}: a task is {' or '.join(in_words)}; got {text!r}"
            ) from error
        names = ", ".join(f"{c.name} ({c.unit})" for c in family.task_columns)
        example = ",".join(["0.5"] * len(family.task_columns))
        raise FamilyError(
            f"{family.name}: a task is {names}, such as {example}; got {text!r}"
        ) from error
    return family.check_task(numbers)


def between(family: TaskFamily, low: float, high: float, count: int) -> TaskSet:
    """Return tasks drawn uniformly between two bounds, such as speeds that were never trained.

    Raises:
        FamilyError: if the bounds are no range, or a task of the family is not one number out of
            infinitely many.
    """
    if family.finite_tasks is not None or len(family.task_columns) != 1:
        raise FamilyError(
            f"{family.name}: tasks between two bounds are for families whose task is one number, "
            "such as a speed; choose single ones with --task"
        )
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise FamilyError(
            f"tasks-from must be two finite numbers, the lower first; got {low:g} {high:g}"
        )
    drawn = task_generator(TEST, TEST_SEED, 0).uniform(low, high, (count, 1))
    return TaskSet(f"from {low:g} to {high:g}", drawn.astype(np.float32))
