"""Held-out evaluation: return against gradient steps, by the paper's test protocol.

The test tasks and their episodes' randomness are the same for every run, method and seed, and are
drawn from a stream of seeds that training never uses.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from envs.family import TaskFamily, WarpSettings
from maml_rl.adapt import Params, broadcast
from maml_rl.advantages import AdvantageSettings
from maml_rl.chunks import Chunks
from maml_rl.devices import Physics, reproducible
from maml_rl.episodes import Episodes, pack
from maml_rl.maml import (
    AdaptationSettings,
    adapt_in_chunks,
    chunk_size,
    estimate_in_chunks,
    update_bytes,
)
from maml_rl.policy import GaussianPolicy
from maml_rl.sampler import Count, Sampler, at_once, task_seeds
from maml_rl.seeds import TEST_SEED
from maml_rl.task_sets import TaskSet, held_out

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ALL = slice(None)
"""Every task of a test."""


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """How a policy is tested."""

    tasks: int = 40
    """Test tasks. A family with finitely many uses each equally often."""
    episodes: int = 20
    """K: episodes for every figure and every update."""
    count: Count = "episodes"
    """`episodes`: K episodes. `steps`: whole episodes until a task holds K H live steps, as the
    paper did; see `SamplingSettings`."""
    steps: int = 3
    """Gradient steps to each task."""
    later_step_scale: float = 0.5
    """Step size over alpha, after the first max(1, inner_steps) updates."""

    def __post_init__(self) -> None:
        """Check ranges."""
        for name, least, most in (
            ("tasks", 1, 100_000),
            ("episodes", 1, 100_000),
            ("steps", 0, 1000),
        ):
            value = getattr(self, name)
            if value < least:
                raise ValueError(f"evaluation.{name} must be at least {least}, got {value}")
            if value > most:
                raise ValueError(f"evaluation.{name} must be at most {most}, got {value}")
        if not 0 < self.later_step_scale < math.inf:
            raise ValueError(
                f"evaluation.later_step_scale must be above 0, got {self.later_step_scale}"
            )
        if self.later_step_scale > 1e6:
            raise ValueError(
                f"evaluation.later_step_scale must be at most 1e+06, got {self.later_step_scale}"
            )


@dataclass(frozen=True)
class Evaluation:
    """Returns of T tasks after 0, 1, ... n gradient steps."""

    tasks: npt.NDArray[np.float32]
    """(T, P)."""
    returns: npt.NDArray[np.float64]
    """(n + 1, T): mean undiscounted return over a task's episodes."""
    return_sds: npt.NDArray[np.float64]
    """(n + 1, T): their standard deviation."""
    measures: npt.NDArray[np.float64]
    """(n + 1, T, Q): the family's measures the wanted way, mean over live steps."""
    episodes: int
    """K: episodes behind every return, or more where they are counted in steps."""
    count: Count = "episodes"
    """What they are counted in."""

    def groups(self, family: TaskFamily) -> Iterator[tuple[str, npt.NDArray[np.bool_]]]:
        """Yield each task of a finite family in words, with the mask (T,) of its repetitions."""
        finite = family.finite_tasks
        for task in [] if finite is None else finite:
            yield family.describe_task(task), (self.tasks == task).all(axis=1)


def step_sizes(adaptation: AdaptationSettings, settings: EvaluationSettings) -> list[float]:
    """Return the step size of each test update: alpha, then a fraction of it."""
    first = max(1, adaptation.inner_steps)
    return [
        adaptation.step_size * (1.0 if k < first else settings.later_step_scale)
        for k in range(settings.steps)
    ]


def adapt_to_tasks(
    policy: GaussianPolicy,
    theta: Params,
    sampler: Sampler,
    tasks: npt.NDArray[np.float32],
    *,
    adaptation: AdaptationSettings,
    advantages: AdvantageSettings,
    sizes: list[float],
    stream: int,
    seed: int,
    chunks: Chunks,
    last: bool,
    first: int = 0,
) -> Iterator[tuple[Params, Episodes | None]]:
    """Yield parameters (T, ...) and episodes after 0, 1, ... gradient steps to T tasks.

    The episodes that come with step k are those that update k + 1 learns from.

    Args:
        policy: the policy.
        theta: its initial parameters (...).
        sampler: samples the tasks' family.
        tasks: (T, P).
        adaptation: inner loss.
        advantages: discount and lambda.
        sizes: step size of each update.
        stream: of seeds: TRAINING, TEST or VALIDATION.
        seed: of the episodes.
        chunks: how tasks are divided.
        last: whether to sample after the last update too; if not, its episodes are None.
        first: the first one's index among all tasks, which its episodes follow from.
    """
    params = broadcast(theta, len(tasks))
    where = torch.from_numpy(tasks)
    end = first + len(tasks)
    for step in range(len(sizes) + 1):
        if step == len(sizes) and not last:
            yield params, None
            return
        seeds = task_seeds(stream, seed, 0, step, end)[first:]
        episodes = sampler.sample(params, where, seeds, first)
        yield params, episodes
        if step < len(sizes):
            estimated, _ = estimate_in_chunks(episodes, advantages, chunks)
            inner = adaptation.inner_step(policy, sizes[step])
            params = adapt_in_chunks(inner, params, pack(episodes, estimated), chunks)


def evaluate(
    policy: GaussianPolicy,
    theta: Params,
    family: TaskFamily,
    *,
    settings: EvaluationSettings,
    adaptation: AdaptationSettings,
    advantages: AdvantageSettings,
    action_scale: float,
    threads: int = 0,
    tasks_at_once: int = 0,
    physics: Physics = "cpu",
    warp: WarpSettings | None = None,
    tasks: TaskSet | None = None,
    part: slice = ALL,
    see: Callable[[Params, Episodes], object] = lambda _, __: None,
) -> Evaluation:
    """Measure returns after 0 to `settings.steps` gradient steps, stochastic policy.

    Args:
        policy: the policy.
        theta: its meta-trained parameters.
        family: what it is tested on.
        settings: how many tasks, episodes and steps.
        adaptation: alpha and the inner loss.
        advantages: discount and lambda.
        action_scale: the policy's action that is the bound.
        threads: of physics and updates; 0 is one a core.
        tasks_at_once: tasks that are simulated together; 0 is all.
        physics: what simulates; `warp` on theta's device.
        warp: its settings.
        tasks: to use in place of the test tasks.
        part: those of them to test, whose figures are as if all had been.
        see: is given parameters (T, ...) and episodes of each step, to keep what it wants.
    """
    source = held_out(family, settings.tasks) if tasks is None else tasks
    chosen = source.tasks[part]
    device = next(iter(theta.values())).device.type
    steps = settings.episodes * family.episode_steps
    wanted = torch.from_numpy(chosen)
    returns, sds, measures = [], [], []
    with ExitStack() as stack:
        stack.enter_context(reproducible(device))
        sampler = stack.enter_context(
            Sampler(
                family,
                policy,
                tasks=at_once(tasks_at_once, len(chosen), settings.episodes),
                episodes=settings.episodes,
                count=settings.count,
                action_scale=action_scale,
                threads=threads,
                device=device,
                physics=physics,
                warp=warp,
            )
        )
        # After the worlds, which take of the same memory.
        counted = source.tasks if device == "cpu" else chosen
        size = chunk_size(len(counted), device, update_bytes(policy, steps, 1))
        chunks = stack.enter_context(Chunks(threads if device == "cpu" else 1, size))
        for params, episodes in adapt_to_tasks(
            policy,
            theta,
            sampler,
            chosen,
            adaptation=adaptation,
            advantages=advantages,
            sizes=step_sizes(adaptation, settings),
            stream=source.stream,
            seed=TEST_SEED,
            chunks=chunks,
            last=True,
            first=part.indices(len(source.tasks))[0],
        ):
            assert episodes is not None  # last=True
            see(params, episodes)
            returns.append(episodes.mean_returns().double().cpu().numpy())
            each = (one.returns().double().cpu().numpy() for one in episodes.each())
            sds.append(np.array([np.nanstd(one) for one in each]))
            means: Tensor = episodes.mean_measures().cpu()
            measures.append(family.wanted_measures(means, wanted).double().numpy())
    return Evaluation(
        chosen,
        np.stack(returns),
        np.stack(sds),
        np.stack(measures),
        settings.episodes,
        settings.count,
    )
