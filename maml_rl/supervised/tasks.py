"""What is learned from few examples: the contract between a problem and the learner.

Letters: M tasks, S examples of a task to adapt to (support), Q to be judged by (query), N ways,
K shots. Axis order is always (task, example, ...).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from maml_rl.seeds import TASKS, seed_sequence

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Split = Literal["train", "validation", "test"]
"""Whose classes or functions a task is drawn from; no two splits share one."""


class Examples(NamedTuple):
    """Examples of M tasks."""

    inputs: Tensor
    """(M, S, ...) float."""
    targets: Tensor
    """(M, S) int64 numbers of classes, or (M, S, Y) float."""

    def to(self, device: str) -> Examples:
        """Return them on a device."""
        return Examples(self.inputs.to(device), self.targets.to(device))

    def of_tasks(self, start: int, stop: int) -> Examples:
        """Return those of tasks start to stop - 1."""
        return Examples(self.inputs[start:stop], self.targets[start:stop])


class Batch(NamedTuple):
    """M tasks."""

    support: Examples
    """To adapt to."""
    query: Examples
    """To judge the adapted parameters by."""

    def to(self, device: str) -> Batch:
        """Return it on a device."""
        return Batch(self.support.to(device), self.query.to(device))

    def of_tasks(self, start: int, stop: int) -> Batch:
        """Return tasks start to stop - 1."""
        return Batch(self.support.of_tasks(start, stop), self.query.of_tasks(start, stop))


class TaskSource(Protocol):
    """Draws tasks; what a problem opens."""

    @property
    def splits(self) -> Sequence[Split]:
        """Those that there is anything in."""

    def sample(
        self, split: Split, count: int, rng: np.random.Generator, *, query: int | None = None
    ) -> Batch:
        """Draw tasks on the CPU.

        Args:
            split: whose.
            count: tasks M.
            rng: decides them; equal generators draw equal tasks.
            query: examples to be judged by (of each class, where there are classes); by default
                as the problem says.
        """


def silent(words: str) -> None:
    """Say nothing."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A kind of task; fields are its settings. Small, and opens nothing until asked."""

    name: ClassVar[str]
    """As experiment files say it."""
    classifies: ClassVar[bool]
    """Whether targets are numbers of classes, else values to regress to."""

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one example's input."""
        raise NotImplementedError

    @property
    def outputs(self) -> int:
        """Numbers that the network gives for an example: N ways, or Y values."""
        raise NotImplementedError

    @property
    def shots(self) -> int:
        """Support examples K: of each class, where there are classes."""
        raise NotImplementedError

    @property
    def training_query(self) -> int:
        """Query examples in training: of each class, where there are classes."""
        raise NotImplementedError

    def open(self, say: Callable[[str], None] = silent) -> TaskSource:
        """Return what draws tasks.

        Args:
            say: is told, in a few words, what takes long.

        Raises:
            InputError: if its data are missing or not as they should be.
        """
        raise NotImplementedError


def task_generator(stream: int, seed: int, number: int) -> np.random.Generator:
    """Return the random numbers of a batch: they follow from stream, seed and number alone."""
    return np.random.default_rng(seed_sequence(stream, seed, TASKS, number))


def floats(array: object) -> Tensor:
    """Return an array as a float32 tensor."""
    return torch.from_numpy(np.ascontiguousarray(array, np.float32))


def check_ranges(problem: Problem, **ranges: tuple[int, int]) -> None:
    """Raise ValueError unless each field named lies between its two bounds."""
    for name, (least, most) in ranges.items():
        value = getattr(problem, name)
        if value < least:
            raise ValueError(f"data.{name} must be at least {least}, got {value}")
        if value > most:
            raise ValueError(f"data.{name} must be at most {most}, got {value}")
