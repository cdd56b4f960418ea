"""Every family as a Gymnasium environment, single and vectorised.

    env = gymnasium.make("MamlRL/HalfCheetahVel-v0", protocol="gymnasium", task=[1.5])
    envs = gymnasium.make_vec("MamlRL/AntDir-v0", num_envs=8)

`import envs` registers the ids. Every field of a family is a keyword argument. A task given to
`make`, or as `reset(options={"task": ...})`, holds until a reset names another (None: draw again);
without one, every episode draws its own. It is in `info["task"]`. Actions are in the body's own
unit. Drawing a body needs OpenGL: without a display, set the environment variable MUJOCO_GL=egl
(or osmesa) before mujoco is imported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import numpy.typing as npt
import torch
from gymnasium.error import ResetNeeded
from gymnasium.spaces import Box
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from envs import make
from envs.cameras import Camera, Frame, open_camera
from envs.family import FamilyError, TaskFamily

Array = npt.NDArray[np.float32]
Rewards = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
# Any: as Gymnasium declares it. Values are arrays, bools and, in final_info, a dict of them.
Info = dict[str, Any]


class Outcome(NamedTuple):
    """What one control step of N environments gives, before any reset."""

    observations: Array
    """(N, O); a diverged environment's is the last good one."""
    rewards: Rewards
    """(N,); 0 where diverged."""
    terminated: Mask
    """(N,); true where diverged."""
    truncated: Mask
    """(N,): the horizon is reached."""
    diverged: Mask
    """(N,)."""


class Lockstep:
    """N environments of one family side by side: what the single and the vector one share.

    Attributes:
        tasks: (N, P) float32, of the episodes under way.
        observations: (N, O) float32, the latest good ones.
    """

    def __init__(
        self, family: TaskFamily, count: int, task: npt.ArrayLike | None, threads: int
    ) -> None:
        self.family = family
        self.count = count
        self._fixed: Array | None = None
        self.fix(task)
        self.worlds = family.make_worlds(count, threads=threads)
        self.tasks = np.zeros((count, len(family.task_columns)), np.float32)
        self.observations = np.zeros((count, len(family.observation_columns)), np.float32)
        self._elapsed = np.zeros(count, np.int64)
        self._over = np.ones(count, np.bool_)

    def fix(self, task: npt.ArrayLike | None) -> None:
        """Give the episodes to come one task (P,), or one each (N, P); None: each draws its own.

        Raises:
            FamilyError: if a task is none of this family.
        """
        if task is None:
            self._fixed = None
            return
        name, width = self.family.name, len(self.family.task_columns)
        try:
            given = np.asarray(task, np.float32)
        except (TypeError, ValueError) as error:
            raise FamilyError(f"{name}: a task is {width} numbers, got {task!r}") from error
        rows = given if given.ndim == 2 else [given] * self.count
        if len(rows) != self.count:
            raise FamilyError(
                f"{name}: one task for all is ({width},) and one each is ({self.count}, {width}), "
                f"got {given.shape}"
            )
        self._fixed = np.stack([self.family.check_task(row) for row in rows])

    def begin(self, generators: Sequence[np.random.Generator], where: Mask) -> None:
        """Start an episode in the environments `where` (N,).

        Each draws from its own generator: its task, unless that is fixed, and then its start.
        """
        rows = np.flatnonzero(where).tolist()
        draws = []
        for row in rows:
            rng = generators[row]
            self.tasks[row] = (
                self.family.sample_tasks(1, rng)[0] if self._fixed is None else self._fixed[row]
            )
            draws.append(self.family.draw_start(rng))
        starts = np.zeros((self.count, len(draws[0])))
        starts[rows] = draws
        observations = self.worlds.reset(
            torch.from_numpy(self.tasks), starts, torch.from_numpy(where)
        )
        self.observations = np.where(where[:, None], observations.numpy(), self.observations)
        self._elapsed[where] = 0
        self._over[where] = False

    def step(self, actions: Array) -> Outcome:
        """Advance every environment by one control step; actions (N, A).

        Raises:
            ResetNeeded: if an episode has ended or not begun.
        """
        if self._over.any():
            raise ResetNeeded("the episode has ended, or none has begun: call reset()")
        step = self.worlds.step(torch.from_numpy(actions))
        # What is not finite is as good as diverged, whatever the simulation says.
        good = ~step.diverged & step.observations.isfinite().all(1) & step.rewards.isfinite()
        diverged = ~good.numpy()
        terminated = step.terminated.numpy() | diverged
        self._elapsed += 1
        truncated = self._elapsed >= self.family.episode_steps
        self._over = terminated | truncated
        self.observations = np.where(
            diverged[:, None], self.observations, step.observations.numpy()
        )
        rewards = np.where(diverged, 0.0, step.rewards.numpy().astype(np.float64))
        return Outcome(self.observations, rewards, terminated, truncated, diverged)


def spaces(family: TaskFamily) -> tuple[Box[np.float32], Box[np.float32]]:
    """Return the observation space, unbounded (O,), and the action space (A,), in its own unit."""
    low, high = (bound.astype(np.float32) for bound in family.action_bounds)
    size = len(family.observation_columns)
    return Box(-np.inf, np.inf, (size,), np.float32), Box(low, high, dtype=np.float32)


def render_metadata(family: TaskFamily, render_mode: str | None) -> Info:
    """Return the metadata of rendering: one frame a control step.

    Raises:
        FamilyError: if the mode is neither None nor rgb_array.
    """
    if render_mode not in (None, "rgb_array"):
        raise FamilyError(
            f"{family.name}: render_mode must be None or 'rgb_array', got {render_mode!r}"
        )
    return {"render_modes": ["rgb_array"], "render_fps": 1.0 / family.control_seconds}


def check_actions(actions: npt.ArrayLike, shape: tuple[int, ...]) -> Array:
    """Return a copy of the actions as float32.

    Raises:
        ValueError: if their shape is another; NumPy's broadcasting would hide it.
    """
    copy = np.array(actions, np.float32)
    if copy.shape != shape:
        raise ValueError(f"actions must have shape {shape}, got {copy.shape}")
    return copy


def apply_options(lockstep: Lockstep, options: Mapping[str, object] | None) -> None:
    """Fix the task that a reset's options name.

    Raises:
        FamilyError: if there is another option, or the task is none of the family.
    """
    given = dict(options or {})
    unknown = [repr(name) for name in given if name != "task"]
    if unknown:
        raise FamilyError(
            f"{lockstep.family.name}: reset has one option, 'task'; got {', '.join(unknown)}"
        )
    if "task" in given:
        lockstep.fix(given["task"])  # type: ignore[arg-type]  # fix checks it


class FamilyEnv(gymnasium.Env[Array, Array]):
    """One environment of a family, on one physics thread.

    It truncates itself at the family's horizon. A world that diverges ends its episode:
    terminated, reward 0, the last good observation, and `info["diverged"]`.
    """

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012  # gymnasium.make reads the class

    def __init__(
        self,
        family: str,
        *,
        task: npt.ArrayLike | None = None,
        render_mode: str | None = None,
        **fields: object,
    ) -> None:
        """Make an environment.

        Args:
            family: its name.
            task: (P,), of every episode; None: each draws its own.
            render_mode: None or rgb_array.
            fields: the family's.

        Raises:
            FamilyError: for a wrong field, task or mode.
        """
        self.family = make(family, **fields)
        self.metadata = render_metadata(self.family, render_mode)
        self.render_mode = render_mode
        self.observation_space, self.action_space = spaces(self.family)
        self._lockstep = Lockstep(self.family, 1, task, threads=1)
        self._camera: Camera | None = None

    def reset(
        self, *, seed: int | None = None, options: Mapping[str, object] | None = None
    ) -> tuple[Array, Info]:
        """Begin an episode; the only option is "task", (P,) or None.

        Raises:
            FamilyError: if an option is unknown or the task is none of the family.
        """
        apply_options(self._lockstep, options)
        super().reset(seed=seed)
        self._lockstep.begin([self.np_random], np.ones(1, np.bool_))
        return self._lockstep.observations[0].copy(), {"task": self._lockstep.tasks[0].copy()}

    def step(self, action: npt.ArrayLike) -> tuple[Array, float, bool, bool, Info]:
        """Advance by one control step; the action (A,) is clipped to its bounds.

        Raises:
            ResetNeeded: if the episode has ended.
        """
        shape = self._lockstep.count, len(self.family.action_columns)
        actions = check_actions(action, shape[1:])[None]
        observations, rewards, terminated, truncated, diverged = self._lockstep.step(actions)
        info: Info = {"task": self._lockstep.tasks[0].copy(), "diverged": bool(diverged[0])}
        return (
            observations[0].copy(),
            float(rewards[0]),
            bool(terminated[0]),
            bool(truncated[0]),
            info,
        )

    def render(self) -> Frame | None:
        """Return a picture of the present state, (height, width, 3), or None without a mode."""
        if self.render_mode is None:
            return None
        self._camera = self._camera or open_camera(self._lockstep.worlds)
        return self._camera.frame(0, self._lockstep.tasks[0])

    def close(self) -> None:
        """Release the world and the camera."""
        if self._camera is not None:
            self._camera.close()
            self._camera = None
        self._lockstep.worlds.close()


class FamilyVectorEnv(VectorEnv[Array, Array, npt.NDArray[np.generic]]):
    """N environments of a family in one batch, the same to the bit as N of `FamilyEnv`.

    An episode's end starts the next in the same step (SAME_STEP): its last observation and info
    are `final_obs` and `final_info`, laid out as in Gymnasium's SyncVectorEnv.
    """

    metadata = {  # noqa: RUF012  # Gymnasium reads the class
        "render_modes": ["rgb_array"],
        "autoreset_mode": AutoresetMode.SAME_STEP,
    }

    def __init__(
        self,
        family: str,
        num_envs: int,
        *,
        task: npt.ArrayLike | None = None,
        render_mode: str | None = None,
        threads: int = 0,
        **fields: object,
    ) -> None:
        """Make N environments.

        Args:
            family: its name.
            num_envs: N.
            task: (P,) for all, or (N, P), one each, of every episode; None: each draws its own.
            render_mode: None or rgb_array.
            threads: that step the physics; 0 is one a core.
            fields: the family's.

        Raises:
            FamilyError: for a wrong field, task or mode.
        """
        self.family = make(family, **fields)
        self.num_envs = num_envs
        self.metadata = self.metadata | render_metadata(self.family, render_mode)
        self.render_mode = render_mode
        self.single_observation_space, self.single_action_space = spaces(self.family)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._lockstep = Lockstep(self.family, num_envs, task, threads)
        self._seed([None] * num_envs)
        self._camera: Camera | None = None

    def _seed(self, seeds: Sequence[int | None]) -> None:
        drawn = [seeding.np_random(seed) for seed in seeds]
        self._generators = [generator for generator, _ in drawn]
        self._seeds = [seed for _, seed in drawn]

    def reset(
        self,
        *,
        seed: int | Sequence[int | None] | None = None,
        options: Mapping[str, object] | None = None,
    ) -> tuple[Array, Info]:
        """Begin an episode in every environment.

        Args:
            seed: of environment i, seed + i; or one each; None: go on drawing.
            options: "task" only: (P,), (N, P) or None.

        Raises:
            FamilyError: if an option is unknown or the task is none of the family.
        """
        N = self.num_envs
        apply_options(self._lockstep, options)
        if isinstance(seed, (int, np.integer)):
            self._seed([int(seed) + i for i in range(N)])
        elif seed is not None:
            if len(seed) != N:
                raise ValueError(f"seeds must be one for each of {N} environments, got {len(seed)}")
            self._seed(seed)
        self._lockstep.begin(self._generators, np.ones(N, np.bool_))
        infos: Info = {"task": self._lockstep.tasks.copy(), "_task": np.ones(N, np.bool_)}
        return self._lockstep.observations.copy(), infos

    def step(self, actions: npt.ArrayLike) -> tuple[Array, Rewards, Mask, Mask, Info]:
        """Advance all by one control step, and begin anew where an episode ends.

        Args:
            actions: (N, A), clipped to their bounds.
        """
        lockstep, N = self._lockstep, self.num_envs
        outcome = lockstep.step(check_actions(actions, (N, len(self.family.action_columns))))
        ended = outcome.terminated | outcome.truncated
        infos: Info = {}
        if ended.any():
            infos = self._final_infos(outcome, ended)
            lockstep.begin(self._generators, ended)
        infos |= {"task": lockstep.tasks.copy(), "_task": np.ones(N, np.bool_)}
        if not ended.all():
            infos |= {"diverged": np.zeros(N, np.bool_), "_diverged": ~ended}
        return (
            lockstep.observations.copy(),
            outcome.rewards,
            outcome.terminated,
            outcome.truncated,
            infos,
        )

    def _final_infos(self, outcome: Outcome, ended: Mask) -> Info:
        """Return the last observations and infos of the episodes that ended, with their masks."""
        observations = np.full(self.num_envs, None, dtype=object)
        for row in np.flatnonzero(ended):
            observations[row] = outcome.observations[row].copy()
        final = {
            "task": np.where(ended[:, None], self._lockstep.tasks, np.float32(0)),
            "_task": ended.copy(),
            "diverged": outcome.diverged & ended,
            "_diverged": ended.copy(),
        }
        return {
            "final_obs": observations,
            "_final_obs": ended.copy(),
            "final_info": final,
            "_final_info": ended.copy(),
        }

    def render(self) -> tuple[Frame, ...] | None:
        """Return a picture of every environment, or None without a mode."""
        if self.render_mode is None:
            return None
        self._camera = self._camera or open_camera(self._lockstep.worlds)
        return tuple(
            self._camera.frame(world, task) for world, task in enumerate(self._lockstep.tasks)
        )

    def close_extras(self, **_: object) -> None:
        """Release the worlds and the camera."""
        if self._camera is not None:
            self._camera.close()
            self._camera = None
        self._lockstep.worlds.close()
