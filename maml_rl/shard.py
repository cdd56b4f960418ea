"""Some tasks of every iteration, in one process: sampled, adapted to, and kept for the outer step.

What a shard finds of a task does not depend on the other tasks that are in it, and it adds tasks up
as `maml_rl/sums.py` says. So a batch may be divided among processes in any way.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from envs.family import TaskFamily
from maml_rl.adapt import Params
from maml_rl.chunks import Chunks, torch_threads
from maml_rl.config import Experiment
from maml_rl.curvature import InnerStep
from maml_rl.devices import reproducible
from maml_rl.episodes import Episodes
from maml_rl.maml import (
    Adapted,
    BatchReport,
    Collect,
    InnerStepError,
    MetaObjective,
    chunk_size,
    sample_and_adapt,
    update_bytes,
)
from maml_rl.memory import memory_to_sample
from maml_rl.policy import GaussianPolicy
from maml_rl.rollout import ActionError, Divergence
from maml_rl.sampler import Sampler, at_once, task_generator, task_seeds
from maml_rl.seeds import TRAINING
from maml_rl.sums import partial_sums


def make_sampler(
    experiment: Experiment[TaskFamily],
    policy: GaussianPolicy,
    tasks: int,
    max_diverged: float | None = None,
) -> Sampler:
    """Make worlds for so many tasks, as an experiment's training samples them.

    Raises:
        RunStopped: if memory does not suffice.
    """
    settings = experiment.sampling
    with memory_to_sample(experiment, "sampling"):
        return Sampler(
            experiment.family,
            policy,
            tasks=at_once(settings.tasks_at_once, tasks, settings.episodes),
            episodes=settings.episodes,
            count=settings.count,
            action_scale=experiment.policy.action_scale,
            max_diverged=settings.max_diverged if max_diverged is None else max_diverged,
            threads=experiment.threads,
            device=experiment.device,
            physics=experiment.physics,
            warp=experiment.warp,
        )


def chunks_for(
    experiment: Experiment[TaskFamily], policy: GaussianPolicy, tasks: int, size: int = 0
) -> Chunks:
    """Make chunks for the update of so many tasks.

    Of `size` tasks, or as `chunk_size` has them; on a GPU one after another, so that its memory
    holds one.
    """
    steps = experiment.sampling.episodes * experiment.family.episode_steps
    task_bytes = update_bytes(policy, steps, experiment.adaptation.inner_steps)
    threads = experiment.threads if experiment.device == "cpu" else 1
    return Chunks(threads, size or chunk_size(tasks, experiment.device, task_bytes))


def collector(
    experiment: Experiment[TaskFamily], sampler: Sampler, iteration: int, start: int, stop: int
) -> Collect:
    """Return what samples tasks start to stop - 1 of an iteration's batch."""
    seed, M = experiment.seed, experiment.sampling.tasks
    drawn = experiment.family.sample_tasks(M, task_generator(TRAINING, seed, iteration))
    tasks = torch.from_numpy(drawn)[start:stop]

    def collect(params: Params, phase: int) -> Episodes:
        seeds = task_seeds(TRAINING, seed, iteration, phase, M)[start:stop]
        with memory_to_sample(experiment, "sampling"):
            try:
                return sampler.sample(params, tasks, seeds, start)
            except ActionError as error:
                # Of theta itself there is no way on; of what an inner step made of it there is.
                raise (InnerStepError if phase else error) from error

    return collect


@dataclass(frozen=True)
class ShardReport:
    """What the tasks of a shard were like in one iteration."""

    batches: tuple[BatchReport, ...]
    """inner_steps + 1, or fewer where an inner step was not finite."""
    divergences: tuple[Divergence | None, ...]
    """The first simulation of each batch that broke down, if any did."""
    seconds: float
    """Of sampling."""


class Shard:
    """Some tasks of one iteration after the other; `begin` forgets the last.

    On whatever device the experiment says; what it is given and what it answers is on the CPU.
    """

    def __init__(
        self, experiment: Experiment[TaskFamily], policy: GaussianPolicy, tasks: int, chunk: int
    ) -> None:
        """Make worlds for so many tasks, and chunks of so many in the update (0: as fits)."""
        self.tasks = tasks
        self._start = 0
        self._experiment = experiment
        self._policy = policy
        self._inner: InnerStep | None = None
        # How many may break down is judged of the whole batch.
        self._sampler = make_sampler(experiment, policy, tasks, max_diverged=1.0)
        self._chunks = chunks_for(experiment, policy, tasks, chunk)
        self._adapted: Adapted | None = None
        self._objective: MetaObjective | None = None

    def begin(self, theta: Params, iteration: int, start: int, stop: int) -> ShardReport:
        """Sample tasks start to stop - 1 of an iteration's batch, adapt to them, and keep them.

        Raises:
            SamplingError: if a task cannot be sampled.
        """
        self.forget()
        self._start = start
        experiment = self._experiment
        self._inner = experiment.adaptation.at(iteration, theta).inner_step(self._policy)
        sample = collector(experiment, self._sampler, iteration, start, stop)
        divergences: list[Divergence | None] = []

        def collect(params: Params, phase: int) -> Episodes:
            episodes = sample(params, phase)
            # The sampler knows of the last batch only.
            divergences.append(self._sampler.divergence)
            return episodes

        with torch_threads(1), reproducible(experiment.device):
            self._adapted = sample_and_adapt(
                {name: p.to(experiment.device) for name, p in theta.items()},
                self._inner,
                experiment.adaptation.inner_steps,
                collect,
                stop - start,
                advantages=experiment.advantages,
                chunks=self._chunks,
                clock=time.perf_counter,
            )
        reports = self._adapted.reports()
        return ShardReport(reports, tuple(divergences), self._adapted.seconds)

    def build(self, pool: int) -> None:
        """Linearise the tasks; `pool` is the live steps of the whole batch after adaptation."""
        assert self._adapted is not None
        assert self._inner is not None
        with torch_threads(1), reproducible(self._experiment.device):
            self._objective = self._adapted.objective(
                self._inner,
                self._chunks,
                pool,
                metric_share=self._experiment.trust_region.metric_share,
                whole=self._experiment.sampling.tasks,
                first=self._start,
            )

    def gradient(self) -> Tensor:
        """Return the gradient summed over the nodes of its tasks, (n, d); see `MetaObjective`."""
        return self._answer(lambda objective: objective.gradient_terms())

    def product(self, vector: Tensor) -> Tensor:
        """Return the Fisher product summed over the nodes of its tasks, (n, d)."""
        there = vector.to(self._experiment.device)
        return self._answer(lambda objective: objective.product_terms(there))

    def metric(self, vector: Tensor) -> Tensor:
        """Return the estimated Fisher product summed likewise, (n, d)."""
        there = vector.to(self._experiment.device)
        return self._answer(lambda objective: objective.metric_terms(there))

    def evaluate(self, candidate: Tensor) -> Tensor:
        """Return surrogate and divergence summed over the nodes of its tasks, (n, 2)."""
        there = candidate.to(self._experiment.device)
        return self._answer(lambda objective: objective.evaluate_terms(there))

    def _answer(self, ask: Callable[[MetaObjective], Tensor]) -> Tensor:
        assert self._objective is not None
        with torch_threads(1), reproducible(self._experiment.device):
            terms = ask(self._objective).cpu()
        return partial_sums(terms, self._start, self._experiment.sampling.tasks)

    def forget(self) -> None:
        """Let go of the tasks."""
        self._objective = self._adapted = None

    def close(self) -> None:
        """Release worlds and threads."""
        self._sampler.close()
        self._chunks.close()
