"""A setting that is another from some iterations on."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TypeVar

V = TypeVar("V")

MAX_ITERATION = 10**9
MAX_SIZE = 1e6
"""Of alpha, and of max_kl in nats; beyond it is a slip."""


def check_size(name: str, size: float) -> None:
    """Raise ValueError for the size of a step, a setting by its name, that is out of range."""
    if not 0 < size < float("inf"):
        raise ValueError(f"{name} must be finite and above 0, got {size}")
    if size > MAX_SIZE:
        raise ValueError(f"{name} must be at most {MAX_SIZE:g}, got {size}")


def check_schedule(section: str, starts: Sequence[int], name: str, later: Sequence[object]) -> None:
    """Raise ValueError unless `later` has a value for each of `starts`, iterations that rise.

    Args:
        section: of the settings, for what is raised.
        starts: `later_from` of the section.
        name: what the values are called there.
        later: the values.
    """
    if any(a >= b for a, b in itertools.pairwise((0, *starts, MAX_ITERATION + 1))):
        raise ValueError(
            f"{section}.later_from must be iterations from 1 to {MAX_ITERATION}, each later "
            f"than the one before, got {list(starts)}"
        )
    if len(starts) != len(later):
        raise ValueError(
            f"{section}.{name} must be one for each of {section}.later_from, got "
            f"{len(later)} for {len(starts)}"
        )


def value_at(iteration: int, first: V, starts: Sequence[int], later: Sequence[V]) -> V:
    """Return the value in one iteration: `first`, or that of the last start not after it."""
    return (first, *later)[sum(start <= iteration for start in starts)]
