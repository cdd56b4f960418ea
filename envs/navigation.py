"""A point that is asked to move to a goal in the plane (Finn et al. 2017, section 5.3)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from envs.family import (
    LARGEST,
    Column,
    DeviceWorlds,
    Draws,
    Floats,
    TaskFamily,
    Transition,
    WarpSettings,
    Worlds,
    check_range,
)


@dataclass(frozen=True, kw_only=True)
class Navigation2D(TaskFamily):
    """Move a point to a goal that it cannot see: reward minus the distance to the goal.

    Reward and ending are judged after the move; the last step is rewarded.

    ===========  =  ==============================================  ======
    task         0  goal x, ~ U[-.5, .5]                            m
    task         1  goal y, likewise                                m
    observation  0  x, starts at 0                                  m
    observation  1  y, likewise                                     m
    action       0  move in x, clipped to [-.1, .1]                 m
    action       1  move in y, likewise                             m
    measure      0  distance to the goal after the move             m
    ===========  =  ==============================================  ======
    """

    horizon: int | None = 100
    """Control steps after which an episode ends (H)."""
    goal_range: float = 0.5
    """Goals lie in the square of plus or minus this, m."""
    max_move: float = 0.1
    """Longest move along each axis in one step, m."""
    goal_radius: float = 0.01
    """The episode ends within this of the goal in x and in y, m."""

    name: ClassVar[str] = "navigation"
    task_columns: ClassVar[tuple[Column, ...]] = (
        Column("goal_x", "m", "goal"),
        Column("goal_y", "m", "goal"),
    )
    measure_columns: ClassVar[tuple[Column, ...]] = (
        Column("distance", "m", "distance to the goal after the move"),
    )
    training_fields: ClassVar[frozenset[str]] = frozenset({"goal_range"})

    def __post_init__(self) -> None:
        """Check ranges."""
        check_range(self.name, "goal_range", self.goal_range, 0, LARGEST)
        check_range(self.name, "max_move", self.max_move, 1e-9, LARGEST)
        check_range(self.name, "goal_radius", self.goal_radius, 0, LARGEST)
        super().__post_init__()

    @property
    def observation_columns(self) -> tuple[Column, ...]:
        """Position x and y."""
        return Column("x", "m", "position"), Column("y", "m", "position")

    @property
    def action_columns(self) -> tuple[Column, ...]:
        """Move in x and y."""
        return Column("move_x", "m"), Column("move_y", "m")

    @property
    def action_bounds(self) -> tuple[Floats, Floats]:
        """Plus or minus `max_move`."""
        return np.full(2, -self.max_move), np.full(2, self.max_move)

    def sample_tasks(self, count: int, rng: np.random.Generator) -> npt.NDArray[np.float32]:
        """Draw goals uniformly from the square, (count, 2)."""
        return rng.uniform(-self.goal_range, self.goal_range, (count, 2)).astype(np.float32)

    def spread_tasks(self, count: int) -> npt.NDArray[np.float32]:
        """Return `count` goals, evenly round a circle of .8 of the range, (count, 2)."""
        angles = np.pi / 4 + 2 * np.pi * np.arange(count) / count
        goals = 0.8 * self.goal_range * np.stack([np.cos(angles), np.sin(angles)], 1)
        return goals.astype(np.float32)

    def describe_task(self, task: npt.ArrayLike) -> str:
        """Return the goal in words."""
        x, y = self.check_task(task)
        return f"goal ({x:.2f}, {y:.2f}) m"

    def outside_training(self, tasks: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
        """Return which goals lie outside the square, (T,)."""
        outside: npt.NDArray[np.bool_] = np.abs(tasks).max(1) > np.float32(self.goal_range)
        return outside

    def ending(self, state: Mapping[str, Floats]) -> str:
        """Return what ends an episode: the point is at its goal."""
        return "there"

    def draw_start(self, rng: np.random.Generator) -> Floats:
        """Return nothing: every episode starts at the origin."""
        return np.zeros(0)

    def draw_starts(self, draws: Draws) -> Tensor:
        """Return nothing for N episodes, (N, 0)."""
        return draws.normal(0)

    def make_worlds(self, count: int, *, threads: int = 0) -> Worlds:
        """Make `count` points; they need no threads."""
        return NavigationWorlds(self, count)

    def make_device_worlds(
        self, count: int, *, device: str | torch.device, settings: WarpSettings
    ) -> DeviceWorlds:
        """Make `count` points on a device; they need no simulator, and so no settings."""
        return NavigationWorlds(self, count, device)


class NavigationWorlds(Worlds):
    """N points in the plane."""

    def __init__(
        self, family: Navigation2D, count: int, device: str | torch.device = "cpu"
    ) -> None:
        self.family = family
        self.count = count
        self.positions = torch.zeros(count, 2, device=device)
        self.device = self.positions.device
        self._goals = torch.zeros_like(self.positions)

    def reset(self, tasks: Tensor, starts: Floats | Tensor, where: Tensor | None = None) -> Tensor:
        """Put points at the origin and give them goals (N, 2)."""
        # Not by indexing with the mask, for which a GPU would have to be waited for.
        rows = self._rows(where)
        self._goals.copy_(torch.where(rows, tasks, self._goals))
        self.positions.masked_fill_(rows, 0.0)
        return self.positions.clone()

    def _rows(self, where: Tensor | None) -> Tensor:
        """Return a mask (N, 1)."""
        if where is None:
            return torch.ones(self.count, 1, dtype=torch.bool, device=self.device)
        return where.unsqueeze(1)

    def step(self, actions: Tensor, where: Tensor | None = None) -> Transition:
        """Move points; actions (N, 2) in metres are clipped per axis."""
        limit = self.family.max_move
        moved = self.positions + actions.clamp(-limit, limit)
        self.positions.copy_(torch.where(self._rows(where), moved, self.positions))
        offset = self.positions - self._goals
        distance = offset.norm(dim=1)
        return Transition(
            observations=self.positions.clone(),
            rewards=-distance,
            terminated=(offset.abs() < self.family.goal_radius).all(1),
            diverged=torch.zeros(self.count, dtype=torch.bool, device=self.device),
            measures=distance[:, None],
        )

    def trouble(self) -> str:
        """Return "": there is always room for a point."""
        return ""

    def as_graph(self, body: Callable[[], None]) -> Callable[[], None]:
        """Return `body`: a step of points is a few launches."""
        return body
