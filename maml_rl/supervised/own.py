"""Tasks of the user's own: a function that draws them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch

from maml_rl.errors import InputError
from maml_rl.supervised.tasks import (
    Batch,
    Examples,
    Problem,
    Split,
    TaskSource,
    floats,
    silent,
)

Arrays = tuple[npt.ArrayLike, npt.ArrayLike]
"""Inputs (M, S, ...), and targets: (M, S) whole numbers of classes, or (M, S, Y) values."""
TaskSampler = Callable[[int, np.random.Generator], tuple[Arrays, Arrays]]
"""Draws M tasks with a generator, and nothing else that is random: support, then query."""


DRAWS = (
    "tasks must draw ((inputs, targets), (inputs, targets)), support and query, with inputs "
    "(M, S, ...) and targets (M, S) whole numbers of classes or (M, S, Y) values"
)
"""What a function must give."""


def as_examples(inputs: npt.ArrayLike, targets: npt.ArrayLike, *, classifies: bool) -> Examples:
    """Return arrays as tensors: float32 inputs, int64 classes or float32 values."""
    given = np.asarray(targets)
    return Examples(
        floats(inputs), torch.from_numpy(given.astype(np.int64)) if classifies else floats(given)
    )


@dataclass(frozen=True, kw_only=True)
class OwnTasks(Problem):
    """What is known of tasks that a function of the user's draws."""

    inputs: tuple[int, ...]
    """Shape of an input."""
    targets: int
    """Classes, or values of a target."""
    support: int
    """Examples of a task to adapt to; of each class, where there are classes."""
    classes: bool
    """Whether targets are numbers of classes."""

    name: ClassVar[str] = "own"

    @property
    def classifies(self) -> bool:  # type: ignore[override]  # known only of each
        """Whether targets are numbers of classes."""
        return self.classes

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of an input."""
        return self.inputs

    @property
    def outputs(self) -> int:
        """Classes, or values."""
        return self.targets

    @property
    def shots(self) -> int:
        """Examples to adapt to."""
        return self.support

    @property
    def training_query(self) -> int:
        """As the function decides."""
        return self.support

    @classmethod
    def of(cls, sampler: TaskSampler, outputs: int | None) -> OwnTasks:
        """Look at one task that a function draws.

        Args:
            sampler: the function.
            outputs: classes; by default one more than the greatest number among many tasks.

        Raises:
            InputError: if what it draws is no support and query.
        """
        try:
            support, query = sampler(64, np.random.default_rng(0))
            (given, wanted), (others, judged) = (map(np.asarray, pair) for pair in (support, query))
        except (TypeError, ValueError) as error:
            raise InputError(f"{DRAWS}; {error}") from error
        classes = bool(np.issubdtype(wanted.dtype, np.integer))
        for x, y in ((given, wanted), (others, judged)):
            if (
                x.ndim < 2
                or y.ndim != (2 if classes else 3)
                or np.issubdtype(y.dtype, np.integer) != classes
            ):
                raise InputError(f"{DRAWS}; got {x.shape} and {y.shape} of {y.dtype}")
            if x.shape[:2] != y.shape[:2] or len(x) != 64:
                raise InputError(
                    f"64 tasks were wanted, got inputs {x.shape} and targets {y.shape}"
                )
        if given.shape[2:] != others.shape[2:] or wanted.shape[2:] != judged.shape[2:]:
            raise InputError(
                f"support and query must be of one shape, got inputs {given.shape} and "
                f"{others.shape}, targets {wanted.shape} and {judged.shape}"
            )
        if outputs is not None and not classes:
            raise InputError(f"targets of {wanted.dtype} are values to regress to, not classes")
        numbers = np.concatenate([wanted.reshape(-1), judged.reshape(-1)])
        many = outputs or (int(numbers.max()) + 1 if classes else wanted.shape[2])
        if classes and not 0 <= numbers.min() <= numbers.max() < many:
            raise InputError(
                f"classes must be from 0 to {many - 1}, got {numbers.min()} to {numbers.max()}"
            )
        shots = given.shape[1] // many if classes else given.shape[1]
        return cls(inputs=given.shape[2:], targets=many, support=max(1, shots), classes=classes)

    def open(self, say: Callable[[str], None] = silent) -> TaskSource:
        """Refuse: a run folder holds no code."""
        raise InputError(
            "this run was trained on tasks of your own: go on in Python, with "
            "maml_rl.supervised.load or resume (RUN, network=, tasks=)"
        )


class OwnSource:
    """Draws tasks by a function of the user's, for every split alike."""

    splits: Sequence[Split] = ("train", "validation", "test")

    def __init__(self, sampler: TaskSampler, *, classifies: bool) -> None:
        self._sampler = sampler
        self._classifies = classifies

    def sample(
        self, split: Split, count: int, rng: np.random.Generator, *, query: int | None = None
    ) -> Batch:
        """Draw tasks; see `TaskSource.sample`. The function decides how many are judged by."""
        support, judged = self._sampler(count, rng)
        return Batch(
            as_examples(*support, classifies=self._classifies),
            as_examples(*judged, classifies=self._classifies),
        )
