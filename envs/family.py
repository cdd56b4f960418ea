"""The contract between what is learned and how it is learned.

A task family is a distribution over tasks on one body: a frozen dataclass whose
fields are its settings. It makes `Worlds`, N copies of the body that are stepped
in lockstep, each with a task of its own. Nothing here knows of policies.
"""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from types import TracebackType
from typing import ClassVar, NamedTuple, Protocol, Self, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Floats = npt.NDArray[np.float64]

T = TypeVar("T")

LARGEST = 1e6
"""No speed, length, mass, noise or price is larger, in its own unit; float32 holds its square."""


class Column(NamedTuple):
    """Name, unit and meaning of one entry of a task, observation, action or measure."""

    name: str
    unit: str
    meaning: str = ""


class Transition(NamedTuple):
    """What one control step of N worlds gives; rows of worlds that were not stepped are stale.

    A diverged world's numbers are meaningless: its step must not be used.
    """

    observations: Tensor
    """(N, O) float32, after the step."""
    rewards: Tensor
    """(N,) float32."""
    terminated: Tensor
    """(N,) bool: the episode ended with this step."""
    diverged: Tensor
    """(N,) bool: the simulation broke down in this step."""
    measures: Tensor
    """(N, Q) float32: the family's `measure_columns`, for reports only."""


class FamilyError(ValueError):
    """A family's setting or task is wrong; the message says which, and what was expected."""


def decided(value: T | None) -> T:
    """Return a setting that may be None only until its family is built.

    Raises:
        FamilyError: if nothing has decided it.
    """
    if value is None:
        raise FamilyError("a setting is None and no protocol decides it")
    return value


def check_range(
    owner: str, name: str, value: float, low: float = -np.inf, high: float = np.inf
) -> None:
    """Raise FamilyError unless low <= value <= high and the value is finite."""
    if not (np.isfinite(value) and low <= value <= high):
        wanted = f"at least {low:g}" if high == np.inf else f"between {low:g} and {high:g}"
        wanted = "finite" if low == -np.inf else wanted
        raise FamilyError(f"{owner}: {name} must be {wanted}, got {value}")


def check_count(owner: str, name: str, value: int | None, low: int, high: int) -> None:
    """Raise FamilyError unless the value is a whole number with low <= value <= high."""
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise FamilyError(
            f"{owner}: {name} must be a whole number between {low} and {high}, got {value!r}"
        )


def check_choice(owner: str, name: str, value: str, choices: Iterable[str]) -> None:
    """Raise FamilyError unless the value is one of `choices`."""
    known = list(choices)
    if value not in known:
        near = difflib.get_close_matches(str(value), known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise FamilyError(f"{owner}: {name} must be one of {', '.join(known)}, got {value!r}{hint}")


class Draws(Protocol):
    """A stream of random numbers for each of N episodes, on a device: (N, size) at a time."""

    def normal(self, size: int) -> Tensor:
        """Draw the next standard normal numbers of every stream, (N, size) float32."""

    def uniform(self, size: int) -> Tensor:
        """Draw the next numbers of every stream that are uniform in (0, 1), (N, size) float32."""


@dataclass(frozen=True, kw_only=True)
class WarpSettings:
    """Physics on a GPU: read only with `physics: warp`."""

    njmax: int = 0
    """Constraint rows that a world has room for (contacts and joint limits); 0: as many as the
    model can have."""
    nconmax: int = 0
    """Contacts that a world has room for, on average over all; 0: likewise."""
    deterministic: bool = True
    """Whether the same episodes come out bit for bit every time, of bodies with at most 32 degrees
    of freedom; without it physics may be faster, and sums are added in whatever order the GPU comes
    to them."""

    def __post_init__(self) -> None:
        """Check ranges."""
        for name in ("njmax", "nconmax"):
            value = getattr(self, name)
            if not 0 <= value <= 100_000:
                raise ValueError(f"warp.{name} must be between 0 and 100000, got {value}")


class Worlds(ABC):
    """N worlds of one family, each with a task; stepped together or some of them.

    `where` is a bool mask (N,), or None for all. Rows of the worlds left out keep their state.
    Close it, or use it in a `with` statement.
    """

    count: int
    """N."""

    @abstractmethod
    def reset(self, tasks: Tensor, starts: Floats, where: Tensor | None = None) -> Tensor:
        """Put worlds at the start of an episode and return observations (N, O) float32.

        Args:
            tasks: (N, P) float32, rows outside `where` ignored.
            starts: (N, S) rows made by the family's `draw_start`, likewise.
            where: which worlds.
        """

    @abstractmethod
    def step(self, actions: Tensor, where: Tensor | None = None) -> Transition:
        """Advance worlds by one control step; `actions` (N, A) in the body's own unit, clipped."""

    def state(self, world: int) -> Mapping[str, Floats]:
        """Return what the simulator holds of one world, by name, for reports; may be empty."""
        return {}

    def close(self) -> None:
        """Release what the worlds hold."""
        return

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class DeviceWorlds(Protocol):
    """`Worlds` that are simulated on a device: what they are given and what they give lies there.

    Nothing in `reset` and `step` waits for the device.
    """

    count: int
    """N."""
    device: torch.device

    def reset(self, tasks: Tensor, starts: Tensor, where: Tensor | None = None) -> Tensor:
        """Put worlds at the start of an episode; `starts` (N, S) by the family's `draw_starts`."""

    def step(self, actions: Tensor, where: Tensor | None = None) -> Transition:
        """Advance worlds by one control step; `actions` (N, A) in the body's own unit, clipped."""

    def state(self, world: int) -> Mapping[str, Floats]:
        """Return what the simulator holds of one world, by name, for reports; may be empty."""

    def trouble(self) -> str:
        """Return what the physics had no room for since this was last asked; empty if nothing."""

    def as_graph(self, body: Callable[[], None]) -> Callable[[], None]:
        """Return a function that does what `body` does, in one launch where the device can.

        `body` steps these worlds and works on tensors of their device, always the same ones; it may
        be run before this returns.
        """

    def close(self) -> None:
        """Release what the worlds hold."""


@dataclass(frozen=True, kw_only=True)
class TaskFamily(ABC):
    """A distribution over tasks on one body.

    Subclasses are frozen dataclasses. They set `name`, describe their columns and implement
    `sample_tasks`, `draw_start` and `make_worlds`. See `envs/half_cheetah.py` for an example of
    a family on a MuJoCo body, and `envs/navigation.py` for one without a simulator.
    """

    horizon: int | None = None
    """Control steps after which an episode ends (H)."""

    name: ClassVar[str]
    """Name in configs, files and commands."""
    task_columns: ClassVar[tuple[Column, ...]]
    """The P numbers of a task."""
    measure_columns: ClassVar[tuple[Column, ...]] = ()
    """The Q numbers that reports show beside returns."""
    training_fields: ClassVar[frozenset[str]] = frozenset()
    """Fields that decide only which tasks training draws, and no return on any of them."""
    ending_is_failure: ClassVar[bool] = False
    """Whether an episode that ends early has failed, which videos show in grey."""

    def __post_init__(self) -> None:
        """Check what every family shares; subclasses call this last."""
        check_count(self.name, "horizon", self.horizon, 1, 1_000_000)

    @property
    @abstractmethod
    def observation_columns(self) -> tuple[Column, ...]:
        """The O numbers of an observation."""

    @property
    @abstractmethod
    def action_columns(self) -> tuple[Column, ...]:
        """The A numbers of an action."""

    @property
    def action_bounds(self) -> tuple[Floats, Floats]:
        """Lowest and highest action, each (A,), in the body's own unit."""
        size = len(self.action_columns)
        return -np.ones(size), np.ones(size)

    @property
    def protocol_name(self) -> str:
        """Which physics, observation and noise returns are measured under; "" if of one kind."""
        return str(getattr(self, "protocol", ""))

    @property
    def episode_steps(self) -> int:
        """H, the horizon once decided."""
        return decided(self.horizon)

    @property
    def control_seconds(self) -> float:
        """Seconds of simulated time in one control step; navigation has no physical time: 1."""
        return 1.0

    @property
    def shown_seconds(self) -> float:
        """Seconds of video that a control step takes; 25 a second where time is not physical."""
        return 1 / 25

    @property
    def shown_mean_steps(self) -> int:
        """Control steps that a measure is averaged over when it is shown as it is now."""
        return 1

    def ending(self, state: Mapping[str, Floats]) -> str:
        """Return how an episode ended early, "fell" in "fell at 1.3 s", from `Worlds.state`."""
        return "ended"

    def moment(self, steps: int) -> str:
        """Return when something is, so many control steps after the start, in words."""
        return f"step {steps}"

    @property
    def world_bytes(self) -> int:
        """Memory that one world takes at the least, bytes; 0 where that is not known."""
        return 0

    @property
    def finite_tasks(self) -> npt.NDArray[np.float32] | None:
        """All tasks (F, P) where the family has finitely many, else None."""
        return None

    @abstractmethod
    def sample_tasks(self, count: int, rng: np.random.Generator) -> npt.NDArray[np.float32]:
        """Draw `count` tasks, (count, P)."""

    def spread_tasks(self, count: int) -> npt.NDArray[np.float32]:
        """Return tasks to show, spread over the family's range, (about `count`, P).

        All of finitely many; else drawn, unless the family knows better.
        """
        finite = self.finite_tasks
        return self.sample_tasks(count, np.random.default_rng(0)) if finite is None else finite

    def check_task(self, task: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Return one task as (P,) float32.

        Raises:
            FamilyError: if it has the wrong width, is not finite, or is no task of this family.
        """
        row = np.asarray(task, np.float32).reshape(-1)
        names = ", ".join(f"{c.name} ({c.unit})" for c in self.task_columns)
        if row.shape != (len(self.task_columns),) or not np.isfinite(row).all():
            raise FamilyError(f"{self.name}: a task is {names}, all finite; got {task!r}")
        finite = self.finite_tasks
        if finite is not None and not (finite == row).all(axis=1).any():
            choices = ", ".join(str(f.tolist()) for f in finite)
            raise FamilyError(f"{self.name}: a task is {names}, one of {choices}; got {task!r}")
        return row

    def describe_task(self, task: npt.ArrayLike) -> str:
        """Return a task in words, with units."""
        row = self.check_task(task)
        return ", ".join(
            f"{c.name} {v:.2f} {c.unit}" for c, v in zip(self.task_columns, row, strict=True)
        )

    def outside_training(self, tasks: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
        """Return which tasks (T, P) training never draws, (T,), as far as the family can tell."""
        return np.zeros(len(tasks), bool)

    def comparable(self, other: TaskFamily) -> bool:
        """Return whether returns on the other family's tasks mean the same as on this one's."""
        return type(self) is type(other) and all(
            getattr(self, item.name) == getattr(other, item.name)
            for item in fields(self)
            if item.name not in self.training_fields
        )

    def wanted_measures(self, measures: Tensor, tasks: Tensor) -> Tensor:
        """Return measures (M, ..., Q) as the task sees them; a direction family flips the sign."""
        return measures

    @abstractmethod
    def draw_start(self, rng: np.random.Generator) -> Floats:
        """Draw the randomness of one episode's start, (S,). The same draw, the same start."""

    @abstractmethod
    def make_worlds(self, count: int, *, threads: int = 0) -> Worlds:
        """Make `count` worlds on `threads` threads (0: one a core), with no task yet."""

    def draw_starts(self, draws: Draws) -> Tensor:
        """Draw what `draw_start` does for N episodes at once, on a device, (N, S) float32."""
        raise FamilyError(f"{self.name} is simulated on the CPU only: use physics cpu")

    def make_device_worlds(
        self, count: int, *, device: str | torch.device, settings: WarpSettings
    ) -> DeviceWorlds:
        """Make `count` worlds that are simulated on a device, where their tensors stay.

        Raises:
            FamilyError: if the family has no such worlds.
            ImportError: if the simulator for it is not installed; the message says how to.
        """
        raise FamilyError(f"{self.name} is simulated on the CPU only: use physics cpu")


def as_mask(where: Tensor | None, count: int) -> Tensor:
    """Return `where` as a bool mask (count,), all true for None."""
    return torch.ones(count, dtype=torch.bool) if where is None else where
