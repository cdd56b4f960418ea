"""The closed loop between policy and worlds: all tasks and episodes in lockstep.

What an episode sees depends on its task's seed and its own index alone, not on how tasks are
split over threads, chunks or machines.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from envs.family import Floats, TaskFamily, Transition, Worlds
from maml_rl.adapt import Params
from maml_rl.chunks import torch_threads
from maml_rl.episodes import Episodes
from maml_rl.policy import GaussianPolicy, log_std
from maml_rl.seeds import EPISODES, TASKS, seed_sequence

Seeds = npt.NDArray[np.uint64]


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


Watch = Callable[[Worlds, Transition | None, Tensor], None]
"""Sees worlds as they are sampled: after their reset, then without a transition, and after each
control step. The mask (N,) says which of them are in that state now, others having ended."""


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How much is sampled for each update."""

    tasks: int = 40
    """M: tasks in a meta-batch."""
    episodes: int = 20
    """K: episodes a task."""
    count: Literal["episodes", "steps"] = "episodes"
    """`episodes`: K episodes. `steps`: whole episodes until a task holds K H live steps, as the
    paper did; the two differ where episodes end early."""
    tasks_at_once: int = 0
    """Tasks that are simulated together; 0 is all. Fewer take less memory, and change nothing."""
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

    def at_once(self, tasks: int) -> int:
        """Return how many of so many tasks are simulated together."""
        return min(self.tasks_at_once or tasks, tasks)


@dataclass(frozen=True)
class Divergence:
    """An episode whose simulation broke down, with all that is needed to do it again."""

    task_index: int
    """In the meta-batch."""
    task_seed: int
    episode: int
    """Of the task, from 0."""
    task: Floats
    """(P,)."""
    start: Floats
    """(S,), what `draw_start` gave."""
    actions: Floats
    """(t + 1, A), in the body's own unit, not clipped; the simulation broke down in the last."""


class SamplingError(RuntimeError):
    """Sampling cannot go on; the message says which task and seed."""

    def __init__(self, message: str, divergence: Divergence | None = None) -> None:
        super().__init__(message)
        self.divergence = divergence


class ActionError(SamplingError):
    """The policy's action is not finite."""


class Sampler(AbstractContextManager["Sampler"]):
    """Samples episodes of many tasks at once; owns one set of worlds.

    Physics runs on `threads` threads (0: one a core); torch on one, since the products of one
    control step are too small to share. Works for policies on a GPU with physics on the CPU.
    """

    def __init__(
        self,
        family: TaskFamily,
        policy: GaussianPolicy,
        *,
        tasks: int,
        episodes: int,
        count: Literal["episodes", "steps"] = "episodes",
        action_scale: float = 1.0,
        max_diverged: float = 1.0,
        threads: int = 0,
        deterministic: bool = False,
        watch: Watch | None = None,
    ) -> None:
        """Make `tasks` x `episodes` worlds; batches of more tasks go through in turn.

        Where the policy is to be `deterministic` it takes its mean action; `watch` sees the worlds.
        """
        self.family = family
        self.policy = policy
        self._max_diverged = max_diverged
        self._deterministic = deterministic
        self._watch = watch
        self._divergence: Divergence | None = None
        self._tasks, self._episodes, self._count = tasks, episodes, count
        self._worlds = family.make_worlds(tasks * episodes, threads=threads)
        low, high = (torch.from_numpy(b).float() for b in family.action_bounds)
        self._middle, self._half = (low + high) / 2.0, (high - low) / 2.0 / action_scale

    def sample(self, params: Params, tasks: Tensor, seeds: Seeds) -> Episodes:
        """Sample episodes of M tasks.

        Args:
            params: parameters of each task's policy, (M, ...).
            tasks: (M, P).
            seeds: (M,), from `task_seeds`.

        Raises:
            ActionError: if the policy's action is not finite.
            SamplingError: if a task's worlds all diverge at their first step, or more worlds
                diverge than may.
        """
        self._divergence = None
        with torch.no_grad(), torch_threads(1):
            parts = []
            for start in range(0, len(tasks), self._tasks):
                rows = slice(start, start + self._tasks)
                part = {name: p[rows] for name, p in params.items()}
                parts.append(self._sample_tasks(part, tasks[rows], seeds[rows], start))
            episodes = join_episodes(parts)
        broken = int(episodes.diverged.sum())
        sampled = int((episodes.diverged | episodes.alive[:, :, 0]).sum())
        if broken > self._max_diverged * sampled:
            raise SamplingError(
                f"the simulation broke down in {broken} of {sampled} episodes, and at most "
                f"{100 * self._max_diverged:g} % may (sampling.max_diverged)",
                self._divergence,
            )
        return episodes

    def _sample_tasks(self, params: Params, tasks: Tensor, seeds: Seeds, offset: int) -> Episodes:
        """Sample the tasks that fit at once: one wave, or waves until each has enough steps."""
        M, K, H = len(tasks), self._episodes, self.family.episode_steps
        wanted = torch.full((M,), K)
        taken = torch.zeros(M, dtype=torch.int64)
        live = torch.zeros(M, dtype=torch.int64)
        waves, used = [], []
        # A wave of K episodes has at least K live steps, so H waves suffice unless simulations
        # diverge at their first step. Where they keep doing so, what there is has to do.
        for _ in range(3 * H):
            wave = self._rollout(params, tasks, seeds, taken, wanted, offset)
            waves.append(wave)
            used.append(torch.arange(K) < wanted.unsqueeze(1))
            taken += wanted
            live += wave.live_steps.cpu()
            if bool((live == 0).any()):
                task = int((live == 0).nonzero()[0])
                raise SamplingError(
                    f"task {offset + task} (seed {seeds[task]}): the simulation diverged at the "
                    "first step of every episode",
                    self._divergence,
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

    def _rollout(
        self,
        params: Params,
        tasks: Tensor,
        seeds: Seeds,
        taken: Tensor,
        wanted: Tensor,
        offset: int,
    ) -> Episodes:
        """Run the next `wanted` (M,) of K slots of each task for one episode, all in lockstep.

        Products always have K rows a task, used or not, so that a task's bits depend on neither
        the other tasks nor on how many episodes are still wanted.
        """
        M, K, H = len(tasks), self._episodes, self.family.episode_steps
        A, Q = self.policy.action_size, len(self.family.measure_columns)
        told = tasks.cpu().unsqueeze(1).expand(M, K, -1)
        width = len(self.family.observation_columns) + told.shape[2] * self.policy.observes_task
        running = (torch.arange(K) < wanted.unsqueeze(1)).flatten()
        starts, noise = self._draw(seeds, taken, running.reshape(M, K))
        out = Episodes(
            observations=torch.zeros(M, K, H, width),
            actions=torch.zeros(M, K, H, A),
            rewards=torch.zeros(M, K, H),
            alive=torch.zeros(M, K, H, dtype=torch.bool),
            log_probs=torch.zeros(M, K, H),
            measures=torch.zeros(M, K, H, Q),
            diverged=torch.zeros(M, K, dtype=torch.bool),
        )
        device = next(iter(params.values())).device
        noise = noise.to(device)
        std = torch.exp(log_std(params)).unsqueeze(1)
        spare = self._worlds.count - M * K

        def widen(values: Tensor) -> Tensor:
            """Add rows for worlds that a batch of fewer tasks leaves idle."""
            return (
                values
                if spare == 0
                else torch.cat([values, values.new_zeros(spare, *values.shape[1:])])
            )

        world_tasks = widen(tasks.cpu().repeat_interleave(K, 0))
        padded_starts = np.concatenate([starts, np.zeros((spare, starts.shape[1]))])
        where = widen(running)
        observations = self._worlds.reset(world_tasks, padded_starts, where)[: M * K]
        if self._watch is not None:
            self._watch(self._worlds, None, where)
        for t in range(H):
            rows_now = observations.reshape(M, K, -1)
            if self.policy.observes_task:
                rows_now = torch.cat([rows_now, told], 2)
            means = self.policy.network.of_tasks(params, rows_now.to(device))
            actions = means + std * noise[:, :, t]
            if not bool(torch.isfinite(actions).all()):
                self._refuse_actions(actions.cpu(), where[: M * K].reshape(M, K), seeds, offset, t)
            out.observations[:, :, t] = rows_now
            out.actions[:, :, t] = actions.to("cpu")
            everyone = bool(where.all())
            controls = self._controls(out.actions[:, :, t]).reshape(M * K, A)
            step = self._worlds.step(widen(controls), None if everyone else where)
            if self._watch is not None:
                self._watch(self._worlds, step, where)
            good = where & ~step.diverged
            out.rewards[:, :, t] = step.rewards[: M * K].reshape(M, K)
            out.alive[:, :, t] = good[: M * K].reshape(M, K)
            out.measures[:, :, t] = step.measures[: M * K].reshape(M, K, Q)
            broken = (where & step.diverged)[: M * K].reshape(M, K)
            out.diverged.logical_or_(broken)
            if self._divergence is None and bool(broken.any()):
                m, k = broken.nonzero()[0].tolist()
                self._divergence = Divergence(
                    task_index=offset + m,
                    task_seed=int(seeds[m]),
                    episode=int(taken[m]) + k,
                    task=tasks[m].double().numpy(),
                    start=starts.reshape(M, K, -1)[m, k],
                    actions=self._controls(out.actions[m, k, : t + 1]).double().numpy(),
                )
            where = good & ~step.terminated
            observations = step.observations[: M * K]
            if not everyone and not bool(where.any()):
                break
        # log N(a; mean, std) with a = mean + std noise.
        constant = 0.5 * math.log(2.0 * math.pi)
        logs = log_std(params).cpu()[:, None, None]
        out.log_probs.copy_((-0.5 * noise.cpu().square() - logs - constant).sum(-1))
        if device.type == "cpu":
            return out
        return Episodes(**{name: value.to(device) for name, value in vars(out).items()})

    def _controls(self, actions: Tensor) -> Tensor:
        """Return actions (..., A) of the policy in the body's own unit, not clipped."""
        return self._middle + self._half * actions

    def _draw(
        self, seeds: Seeds, taken: Tensor, used: Tensor
    ) -> tuple[npt.NDArray[np.float64], Tensor]:
        """Draw starts (M K, S) and action noise (M, K, H, A), each episode's from its index."""
        M, K = used.shape
        H, A = self.family.episode_steps, self.policy.action_size
        noise = np.zeros((M, K, H, A), np.float32)
        starts: npt.NDArray[np.float64] | None = None
        for task in range(M):
            for slot in range(int(used[task].sum())):
                index = int(taken[task]) + slot
                # Not a list of ints, which NumPy rounds to 53 bits where one is above 2^63.
                key = np.array([seeds[task], index], np.uint64)
                rng = np.random.Generator(np.random.Philox(key=key))
                start = self.family.draw_start(rng)
                if starts is None:
                    starts = np.zeros((M, K, len(start)))
                starts[task, slot] = start
                if not self._deterministic:
                    rng.standard_normal(dtype=np.float32, out=noise[task, slot])
        assert starts is not None  # a wave has at least one episode
        return starts.reshape(M * K, -1), torch.from_numpy(noise)

    def _refuse_actions(
        self, actions: Tensor, running: Tensor, seeds: Seeds, offset: int, t: int
    ) -> None:
        bad = (~torch.isfinite(actions).all(-1)) & running
        if not bool(bad.any()):
            return
        task = int(bad.nonzero()[0][0])
        raise ActionError(
            f"the policy's action is not finite: task {offset + task} (seed {seeds[task]}), "
            f"control step {t}"
        )

    def close(self) -> None:
        """Release the worlds."""
        self._worlds.close()

    def __exit__(self, *exception: object) -> None:
        self.close()


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
