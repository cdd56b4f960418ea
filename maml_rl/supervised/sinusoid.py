"""Sine curves of unknown amplitude and phase, from a few points (Finn et al. 2017, section 5.1)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

from maml_rl.supervised.tasks import Batch, Examples, Problem, Split, check_ranges, floats

Array = npt.NDArray[np.float64]


class Curves(NamedTuple):
    """M curves y = amplitude sin(x - phase)."""

    amplitude: Array
    """(M,)."""
    phase: Array
    """(M,) radians."""

    def values(self, x: Array) -> Array:
        """Return y (M, S) at x (M, S)."""
        value: Array = self.amplitude[:, None] * np.sin(x - self.phase[:, None])
        return value


@dataclass(frozen=True, kw_only=True)
class Sinusoid(Problem):
    """Regress y = A sin(x - phase), A ~ U[.1, 5], phase ~ U[0, pi], x ~ U[-5, 5].

    ======  =  ===========================================
    input   0  x
    input   1  amplitude, where `observe_task`
    input   2  phase, radians, likewise
    target  0  y
    ======  =  ===========================================
    """

    shots: int = 10
    """Points K to adapt to."""
    query: int = 10
    """Points to judge the adapted network by."""
    amplitude: tuple[float, float] = (0.1, 5.0)
    """Least and greatest amplitude."""
    phase: tuple[float, float] = (0.0, math.pi)
    """Least and greatest phase, radians."""
    x: tuple[float, float] = (-5.0, 5.0)
    """Where points lie."""
    observe_task: bool = False
    """Whether amplitude and phase are inputs too: the oracle's network."""

    name: ClassVar[str] = "sinusoid"
    classifies: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check ranges."""
        check_ranges(self, shots=(1, 100_000), query=(1, 100_000))
        for name in ("amplitude", "phase", "x"):
            low, high = getattr(self, name)
            if not -1e6 <= low < high <= 1e6:
                raise ValueError(
                    f"data.{name} must be two numbers from -1e+06 to 1e+06, the lower first, got "
                    f"{low:g} and {high:g}"
                )

    @property
    def input_shape(self) -> tuple[int, ...]:
        """x alone, or with amplitude and phase."""
        return (3,) if self.observe_task else (1,)

    @property
    def outputs(self) -> int:
        """y."""
        return 1

    @property
    def training_query(self) -> int:
        """Points to judge by."""
        return self.query

    def open(self, say: Callable[[str], None] = lambda _: None) -> Sinusoids:
        """Return what draws curves."""
        return Sinusoids(self)

    def draw_curves(self, count: int, rng: np.random.Generator) -> Curves:
        """Draw curves."""
        return Curves(rng.uniform(*self.amplitude, count), rng.uniform(*self.phase, count))

    def examples(self, curves: Curves, x: Array) -> Examples:
        """Return points of curves at x (M, S): inputs (M, S, 1 or 3), targets (M, S, 1)."""
        inputs = x[..., None]
        if self.observe_task:
            told = np.stack(curves, axis=1)[:, None]
            inputs = np.concatenate([inputs, np.broadcast_to(told, (*x.shape, 2))], axis=2)
        return Examples(floats(inputs), floats(curves.values(x)[..., None]))


class Sinusoids:
    """Draws curves and points on them; the splits differ in their random numbers alone."""

    splits: tuple[Split, ...] = ("train", "validation", "test")

    def __init__(self, problem: Sinusoid) -> None:
        self._problem = problem

    def sample(
        self, split: Split, count: int, rng: np.random.Generator, *, query: int | None = None
    ) -> Batch:
        """Draw tasks; see `TaskSource.sample`."""
        problem = self._problem
        curves = problem.draw_curves(count, rng)
        points = problem.shots + (problem.query if query is None else query)
        x = rng.uniform(*problem.x, (count, points))
        both = problem.examples(curves, x)
        return Batch(
            *(
                Examples(both.inputs[:, part], both.targets[:, part])
                for part in (slice(None, problem.shots), slice(problem.shots, None))
            )
        )
