"""The closed loop between policy and worlds: all tasks and episodes in lockstep.

What an episode sees depends on its task's seed and its own index alone, not on how tasks are
split over threads, chunks or machines.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from envs.family import TaskFamily, WarpSettings
from maml_rl.adapt import Params
from maml_rl.chunks import torch_threads
from maml_rl.device_rollout import DeviceRollout
from maml_rl.devices import Physics, as_it_comes
from maml_rl.episodes import Episodes
from maml_rl.errors import RunWarning
from maml_rl.policy import GaussianPolicy
from maml_rl.rollout import (
    Divergence,
    HostRollout,
    Loop,
    Rollout,
    SamplingError,
    Seeds,
    Watch,
    Wave,
)
from maml_rl.seeds import EPISODES, TASKS, seed_sequence


def task_seeds(stream: int, seed: int, iteration: int, phase: int, tasks: int) -> Seeds:
    """Return a seed for each task of a batch, (tasks,), from its index alone."""
    return np.array(
        [
            seed_sequence(stream, seed, EPISODES, iteration, phase, task).generate_state(
                1, np.uint64
            )[0]
            for task in range(tasks)
        ]
    )


def task_generator(stream: int, seed: int, iteration: int) -> np.random.Generator:
    """Return the generator that draws the tasks of one iteration."""
    return np.random.default_rng(seed_sequence(stream, seed, TASKS, iteration))


Count = Literal["episodes", "steps"]
"""What a batch is counted in."""
COUNTS: tuple[Count, ...] = get_args(Count)


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How much is sampled for each update."""

    tasks: int = 40
    """M: tasks in a meta-batch."""
    episodes: int = 20
    """K: episodes a task."""
    count: Count = "episodes"
    """`episodes`: K episodes. `steps`: whole episodes until a task holds K H live steps, as the
    paper did; the two differ where episodes end early."""
    tasks_at_once: int = 0
    """Tasks that are simulated together; 0 is all. Fewer take less memory, and change nothing (on a
    GPU, nothing but rounding). Rounded up so that they have a multiple of four episodes."""
    max_diverged: float = 0.1
    """Fraction of a batch's episodes whose simulation may break down; above it the run stops."""

    def __post_init__(self) -> None:
        """Check ranges."""
        for name, least in (("tasks", 1), ("episodes", 1), ("tasks_at_once", 0)):
            value = getattr(self, name)
            if value < least:
                raise ValueError(f"sampling.{name} must be at least {least}, got {value}")
            if value > 100_000:
                raise ValueError(f"sampling.{name} must be at most 100000, got {value}")
        if not 0 <= self.max_diverged <= 1:
            raise ValueError(
                f"sampling.max_diverged must be between 0 and 1, got {self.max_diverged}"
            )


def whole_bytes(episodes: int) -> int:
    """Return how many tasks of so many episodes have actions that are whole 16 bytes.

    MKL multiplies a batch of matrices in a way that depends on whether a product begins at a
    multiple of 16 bytes, and those of a task's K episodes begin where those of the tasks before
    it end: where tasks are cut, K times any width of float32 must come to such a multiple.
    """
    return 4 // math.gcd(4, episodes)


def at_once(wanted: int, tasks: int, episodes: int) -> int:
    """Return how many of so many tasks are simulated together, so that no bit depends on it.

    Args:
        wanted: tasks; 0 is all. A few more where episodes are odd in number; see `whole_bytes`.
        tasks: that there are.
        episodes: of each.
    """
    whole = whole_bytes(episodes)
    return min(-(-wanted // whole) * whole or tasks, tasks)


ROLLOUTS: Mapping[Physics, Callable[[Loop], Rollout]] = {
    "cpu": HostRollout,
    "warp": DeviceRollout,
}
"""How episodes are run, by where the physics is."""


class Sampler(AbstractContextManager["Sampler"]):
    """Samples episodes of many tasks at once; owns their worlds.

    Physics on the CPU runs on `threads` threads (0: one a core); torch on one, since the products
    of one control step are too small to share.
    """

    def __init__(
        self,
        family: TaskFamily,
        policy: GaussianPolicy,
        *,
        tasks: int,
        episodes: int,
        count: Count = "episodes",
        action_scale: float = 1.0,
        max_diverged: float = 1.0,
        threads: int = 0,
        deterministic: bool = False,
        watch: Watch | None = None,
        device: str = "cpu",
        physics: Physics = "cpu",
        warp: WarpSettings | None = None,
    ) -> None:
        """Make `tasks` x `episodes` worlds; batches of more tasks go through in turn.

        Where the policy is to be `deterministic` it takes its mean action; `watch` sees the worlds,
        which must be on the CPU. `device` is where the policy's parameters will be.

        Raises:
            FamilyError: if the family cannot be simulated by `physics`.
            ImportError: if what simulates it is not installed.
        """
        self._max_diverged = max_diverged
        self._tasks, self._count = tasks, count
        self._loop = Loop(
            family=family,
            policy=policy,
            tasks=tasks,
            episodes=episodes,
            action_scale=action_scale,
            threads=threads,
            deterministic=deterministic,
            watch=watch,
            device=device,
            warp=warp or WarpSettings(),
        )
        self._rollout = ROLLOUTS[physics](self._loop)

    def sample(self, params: Params, tasks: Tensor, seeds: Seeds, first: int = 0) -> Episodes:
        """Sample episodes of M tasks.

        Args:
            params: parameters of each task's policy, (M, ...).
            tasks: (M, P).
            seeds: (M,), from `task_seeds`.
            first: the first one's index in the meta-batch, for messages.

        Raises:
            ActionError: if the policy's action is not finite.
            SamplingError: if a task's worlds all diverge at their first step, or more worlds
                diverge than may.

        Warns:
            RunWarning: if physics on a GPU had no room for all contacts.
        """
        self._rollout.divergence = None
        try:
            episodes = self._sample(params, tasks, seeds, first)
        except SamplingError as error:
            if trouble := self._rollout.trouble():
                error.args = (f"{error}; {trouble}",)
            raise
        if trouble := self._rollout.trouble():
            warnings.warn(trouble, RunWarning, stacklevel=2)
        return episodes

    def _sample(self, params: Params, tasks: Tensor, seeds: Seeds, first: int) -> Episodes:
        """Sample the batch, part by part."""
        with torch.no_grad(), torch_threads(1), as_it_comes():
            parts = []
            for start in range(0, len(tasks), self._tasks):
                rows = slice(start, start + self._tasks)
                part = {name: p[rows] for name, p in params.items()}
                here = tasks[rows].cpu()
                parts.append(self._sample_tasks(part, here, seeds[rows], first + start))
            episodes = join_episodes(parts)
        broken = int(episodes.diverged.sum())
        sampled = int((episodes.diverged | episodes.alive[:, :, 0]).sum())
        check_diverged(broken, sampled, self._max_diverged, self.divergence)
        return episodes

    @property
    def divergence(self) -> Divergence | None:
        """The first simulation that broke down in the last batch, if any did."""
        return self._rollout.divergence

    def _sample_tasks(self, params: Params, tasks: Tensor, seeds: Seeds, offset: int) -> Episodes:
        """Sample the tasks that fit at once: one wave, or waves until each has enough steps."""
        M, K, H = len(tasks), self._loop.episodes, self._loop.family.episode_steps
        wanted = torch.full((M,), K)
        taken = torch.zeros(M, dtype=torch.int64)
        live = torch.zeros(M, dtype=torch.int64)
        waves, used = [], []
        # A wave of K episodes has at least K live steps, so H waves suffice unless simulations
        # diverge at their first step. Where they keep doing so, what there is has to do.
        for _ in range(3 * H):
            wave = self._rollout.run(Wave(params, tasks, seeds, taken.clone(), wanted, offset))
            waves.append(wave)
            used.append(torch.arange(K) < wanted.unsqueeze(1))
            taken += wanted
            live += wave.live_steps.cpu()
            if bool((live == 0).any()):
                task = int((live == 0).nonzero()[0])
                raise SamplingError(
                    f"task {offset + task} (seed {seeds[task]}): the simulation diverged at the "
                    "first step of every episode",
                    self._rollout.divergence,
                )
            if self._count == "episodes":
                break
            # As many more as the mean length so far says, but never more than fit at once.
            missing = (K * H - live).clamp(min=0)
            needed = torch.ceil(missing * taken / live).long()
            wanted = needed.clamp(max=K)
            if not bool((wanted > 0).any()):
                break
        return join_waves(waves, torch.cat(used, 1))

    def close(self) -> None:
        """Release the worlds."""
        self._rollout.close()

    def __exit__(self, *exception: object) -> None:
        self.close()


def check_diverged(broken: int, sampled: int, most: float, divergence: Divergence | None) -> None:
    """Raise SamplingError if of so many episodes more than a fraction `most` broke down."""
    if broken > most * sampled:
        raise SamplingError(
            f"the simulation broke down in {broken} of {sampled} episodes, and at most "
            f"{100 * most:g} % may (sampling.max_diverged)",
            divergence,
        )


def join_waves(waves: Sequence[Episodes], used: Tensor) -> Episodes:
    """Join episodes of the same tasks along the episode axis, leaving out slots not used.

    Args:
        waves: W batches of K slots for each of M tasks.
        used: (M, W K) bool: the slots that held an episode.
    """
    if len(waves) == 1:
        return waves[0]
    longest = int(used.sum(1).max())
    order = torch.argsort(~used, dim=1, stable=True)[:, :longest]

    def take(name: str) -> Tensor:
        joined = torch.cat([getattr(w, name) for w in waves], 1)
        index = order.to(joined.device).reshape(*order.shape, *[1] * (joined.ndim - 2))
        return joined.gather(1, index.expand(*order.shape, *joined.shape[2:]))

    return Episodes(**{name: take(name) for name in vars(waves[0])})


def join_episodes(parts: Sequence[Episodes]) -> Episodes:
    """Join batches of different tasks; a task with fewer episodes gets empty ones."""
    if len(parts) == 1:
        return parts[0]
    longest = max(part.alive.shape[1] for part in parts)

    def pad(values: Tensor) -> Tensor:
        shape = (values.shape[0], longest - values.shape[1], *values.shape[2:])
        return torch.cat([values, values.new_zeros(shape)], 1)

    names = vars(parts[0])
    return Episodes(**{n: torch.cat([pad(getattr(p, n)) for p in parts]) for n in names})
