"""Any Gymnasium environment with continuous actions and a settable task, as a task family.

    family = envs.from_gymnasium(make_env, sample_tasks, set_task, horizon=200)

The environments run in this process, one step after another. An environment is reset with a seed
of its episode's own, and never stepped past its end, so that an episode depends on nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple, TypeAlias

import gymnasium
import numpy as np
import numpy.typing as npt
import torch
from gymnasium.spaces import Box
from torch import Tensor

from envs.family import Column, FamilyError, Floats, TaskFamily, Transition, Worlds, as_mask
from envs.references import refer_to, resolve

# Any: what an environment observes and does is its author's affair; the family checks the spaces.
AnyEnv: TypeAlias = gymnasium.Env[Any, Any]
MakeEnv = Callable[[], AnyEnv]
SampleTasks = Callable[[int, np.random.Generator], npt.ArrayLike]
SetTask = Callable[[AnyEnv, npt.NDArray[np.float32]], None]


class Facts(NamedTuple):
    """What one environment says of itself."""

    observation_size: int
    low: Floats
    """Lowest action (A,)."""
    high: Floats
    """Highest action (A,)."""
    longest: int | None
    """Steps after which its time limit ends an episode."""


def float_box(space: object, what: str) -> Box:
    """Return the space if it is a Box of floats.

    Raises:
        FamilyError: if it is not; observations and actions of a Gaussian policy are numbers.
    """
    if not (isinstance(space, Box) and np.issubdtype(space.dtype, np.floating)):
        raise FamilyError(f"gymnasium: the {what} space must be a Box of floats, got {space}")
    return space


@dataclass(frozen=True, kw_only=True)
class GymnasiumFamily(TaskFamily):
    """Tasks of an environment from elsewhere.

    Made of names alone, so that a config can hold it. A name is a reference to a function,
    "package.module:function"; from the command line it takes --allow-import. In Python,
    `from_gymnasium` takes the functions themselves.

    Observations and actions are the environment's, flattened. An episode ends where the
    environment ends or truncates it, or at the horizon. A reward or observation that is not
    finite counts as diverged.
    """

    make_env: str = ""
    """Reference to () -> gymnasium.Env: a new environment at each call."""
    draw_tasks: str = ""
    """Reference to (count, numpy generator) -> tasks (count, P)."""
    set_task: str = ""
    """Reference to (env, task (P,) float32) -> None: called before each reset of the episode's
    environment, as `make_env` returned it; what is inside the wrappers is `env.unwrapped`."""
    task_names: tuple[str, ...] = ()
    """Name of each number of a task; task_0, task_1, ... if left empty."""
    task_units: tuple[str, ...] = ()
    """Unit of each; none if left empty."""

    name: ClassVar[str] = "gymnasium"

    def __post_init__(self) -> None:
        """Ask an environment and a draw of tasks what the fields leave open, and check."""
        for field in ("make_env", "draw_tasks", "set_task"):
            if not callable(self._function(field)):
                raise FamilyError(f"{self.name}: {field} {getattr(self, field)} is no function")
        longest = self._facts.longest
        if self.horizon is None:
            if longest is None:
                raise FamilyError(f"{self.name}: the environment has no time limit: give horizon")
            object.__setattr__(self, "horizon", longest)
        width = self._draw(2, np.random.default_rng(0)).shape[1]
        for field, default in (
            ("task_names", [f"task_{i}" for i in range(width)]),
            ("task_units", [""] * width),
        ):
            names = tuple(getattr(self, field)) or tuple(default)
            if len(names) != width:
                raise FamilyError(
                    f"{self.name}: a task is {width} numbers, but {field} has {len(names)}"
                )
            object.__setattr__(self, field, names)
        if len(set(self.task_names)) < width:
            raise FamilyError(f"{self.name}: task_names has a name twice: {self.task_names}")
        super().__post_init__()

    def _function(self, field: str) -> Any:
        """Return what a field refers to. Any: what a name turns out to be, no type can say."""
        reference = getattr(self, field)
        if not reference:
            raise FamilyError(f"{self.name}: give {field}, a reference package.module:function")
        return resolve(reference)

    def new_env(self) -> AnyEnv:
        """Make an environment.

        Raises:
            FamilyError: if it is none.
        """
        env = self._function("make_env")()
        if not isinstance(env, gymnasium.Env):
            raise FamilyError(
                f"{self.name}: {self.make_env} must return a gymnasium.Env, got {env}"
            )
        return env

    def put_task(self, env: AnyEnv, task: npt.NDArray[np.float32]) -> None:
        """Give an environment a task (P,), from its next reset on."""
        self._function("set_task")(env, task)

    def _draw(self, count: int, rng: np.random.Generator) -> npt.NDArray[np.float32]:
        """Return tasks (count, P) of whatever width, finite."""
        tasks = np.asarray(self._function("draw_tasks")(count, rng), np.float32)
        if tasks.ndim != 2 or len(tasks) != count or not np.isfinite(tasks).all():
            raise FamilyError(
                f"{self.name}: {self.draw_tasks} must return finite tasks ({count}, P), "
                f"got shape {tasks.shape}: {tasks}"
            )
        return tasks

    @cached_property
    def _facts(self) -> Facts:
        env = self.new_env()
        try:
            observation = float_box(env.observation_space, "observation")
            action = float_box(env.action_space, "action")
            if not action.is_bounded():
                raise FamilyError(f"{self.name}: the action space must be bounded, got {action}")
            return Facts(
                observation_size=int(np.prod(observation.shape)),
                low=action.low.astype(np.float64).reshape(-1),
                high=action.high.astype(np.float64).reshape(-1),
                longest=None if env.spec is None else env.spec.max_episode_steps,
            )
        finally:
            env.close()

    @property
    def task_columns(self) -> tuple[Column, ...]:  # type: ignore[override]  # known per family here
        """The P numbers of a task, as named."""
        return tuple(map(Column, self.task_names, self.task_units))

    @property
    def observation_columns(self) -> tuple[Column, ...]:
        """The flattened observation."""
        return tuple(Column(f"observation_{i}", "") for i in range(self._facts.observation_size))

    @property
    def action_columns(self) -> tuple[Column, ...]:
        """The flattened action."""
        return tuple(Column(f"action_{i}", "") for i in range(len(self._facts.low)))

    @property
    def action_bounds(self) -> tuple[Floats, Floats]:
        """The action space's."""
        return self._facts.low.copy(), self._facts.high.copy()

    def sample_tasks(self, count: int, rng: np.random.Generator) -> npt.NDArray[np.float32]:
        """Draw tasks with `draw_tasks`, (count, P).

        Raises:
            FamilyError: if it returns something else.
        """
        tasks = self._draw(count, rng)
        if tasks.shape[1] != len(self.task_names):
            raise FamilyError(
                f"{self.name}: {self.draw_tasks} must return tasks of {', '.join(self.task_names)}"
                f", got {tasks.shape[1]} numbers"
            )
        return tasks

    def draw_start(self, rng: np.random.Generator) -> Floats:
        """Draw the seed of one episode's reset, (1,): a whole number below 2^31."""
        return np.array([rng.integers(2**31)], np.float64)

    def make_worlds(self, count: int, *, threads: int = 0) -> Worlds:
        """Make `count` environments; they run in this thread, whatever `threads` says."""
        return GymnasiumWorlds(self, count)


class GymnasiumWorlds(Worlds):
    """N environments, stepped one after another.

    Not Gymnasium's SyncVectorEnv, which has no step of some of its environments: an episode that
    has ended would go on, under actions that nobody chose.
    """

    def __init__(self, family: GymnasiumFamily, count: int) -> None:
        """Make the environments.

        Raises:
            FamilyError: if `make_env` returns one environment twice.
        """
        self.family = family
        self.count = count
        self._envs = [family.new_env() for _ in range(count)]
        if len({id(env.unwrapped) for env in self._envs}) < count:
            raise FamilyError(f"{family.name}: {family.make_env} must make a new one at each call")
        self._bounds = family.action_bounds
        self._space = float_box(self._envs[0].action_space, "action")
        self._observations = np.zeros((count, len(family.observation_columns)), np.float32)
        self._rewards = np.zeros(count, np.float32)
        self._terminated = np.zeros(count, np.bool_)
        self._diverged = np.zeros(count, np.bool_)

    def reset(self, tasks: Tensor, starts: Floats, where: Tensor | None = None) -> Tensor:
        """Give environments their tasks (N, P) and reset them with their seeds `starts` (N, 1)."""
        mask = as_mask(where, self.count).numpy()
        for row in np.flatnonzero(mask).tolist():
            env = self._envs[row]
            self.family.put_task(env, tasks[row].numpy().copy())
            observation, _ = env.reset(seed=int(starts[row, 0]))
            self._observations[row] = np.reshape(observation, -1)
        self._terminated[mask] = self._diverged[mask] = False
        return torch.from_numpy(self._observations.copy())

    def step(self, actions: Tensor, where: Tensor | None = None) -> Transition:
        """Advance environments by one step; actions (N, A) are clipped to the bounds.

        One whose episode has ended is not stepped, and its row stays as it was.
        """
        rows = as_mask(where, self.count).numpy() & ~self._terminated & ~self._diverged
        clipped = np.clip(actions.numpy(), *self._bounds).astype(self._space.dtype)
        shaped = clipped.reshape(self.count, *self._space.shape)
        for row in np.flatnonzero(rows).tolist():
            observation, reward, terminated, truncated, _ = self._envs[row].step(shaped[row])
            with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite: diverged
                self._observations[row] = np.reshape(observation, -1)
                self._rewards[row] = reward
            self._terminated[row] = terminated or truncated
        finite = np.isfinite(self._observations).all(1) & np.isfinite(self._rewards)
        self._diverged |= rows & ~finite
        return Transition(
            observations=torch.from_numpy(self._observations.copy()),
            rewards=torch.from_numpy(self._rewards.copy()),
            terminated=torch.from_numpy(self._terminated.copy()),
            diverged=torch.from_numpy(self._diverged.copy()),
            measures=torch.zeros(self.count, 0),
        )

    def close(self) -> None:
        """Close the environments."""
        for env in self._envs:
            env.close()


def from_gymnasium(
    make_env: MakeEnv | str,
    sample_tasks: SampleTasks | str,
    set_task: SetTask | str,
    *,
    horizon: int | None = None,
    task_names: tuple[str, ...] = (),
    task_units: tuple[str, ...] = (),
) -> GymnasiumFamily:
    """Make a task family of a Gymnasium environment.

    Each of the three functions may be a reference, "package.module:function", which is imported
    only inside `allow_imports()`. A config can name functions of a module, but no lambdas.

    Args:
        make_env: makes a new environment at each call; actions a bounded Box, observations a Box.
        sample_tasks: (count, generator) -> tasks (count, P). The family's field `draw_tasks`.
        set_task: gives an environment a task (P,) float32; called before each reset.
        horizon: steps after which an episode ends; None: the environment's own time limit.
        task_names: of the P numbers; task_0, task_1, ... by default.
        task_units: of the P numbers; none by default.

    Raises:
        FamilyError: if a space, a reference, a task's shape or the horizon is wrong or missing.
    """
    return GymnasiumFamily(
        make_env=make_env if isinstance(make_env, str) else refer_to(make_env),
        draw_tasks=sample_tasks if isinstance(sample_tasks, str) else refer_to(sample_tasks),
        set_task=set_task if isinstance(set_task, str) else refer_to(set_task),
        horizon=horizon,
        task_names=task_names,
        task_units=task_units,
    )
