"""One meta-iteration of MAML for reinforcement learning (Finn et al. 2017, Algorithm 3).

Sample with theta, adapt, sample with the adapted parameters, and step theta within a trust region
on the adapted policies. Everything here is a sum over tasks; tasks go through in chunks, each on
one thread, and their terms are added in task order in float64, so the result does not depend on
the number of threads.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from maml_rl.adapt import Params, broadcast, flatten, unflatten
from maml_rl.advantages import AdvantageSettings, estimate_advantages
from maml_rl.chunks import Chunks, join_tasks, of_tasks
from maml_rl.curvature import InnerStep, Linearisation, Linearise, linearise
from maml_rl.episodes import Episodes, Steps, pack
from maml_rl.losses import INNER_LOSSES
from maml_rl.policy import (
    GaussianPolicy,
    Mlp,
    kl_divergence,
    log_density,
    log_std,
    noise_variance,
)
from maml_rl.schedule import MAX_SIZE, check_schedule, check_size, value_at
from maml_rl.sums import sum_of
from maml_rl.trust_region import Objective, Report, TrustRegionSettings, trust_region_step

INNER_STEP_NOT_FINITE = "inner step not finite"
"""Why an update was refused before it was begun."""


@dataclass(frozen=True, kw_only=True)
class AdaptationSettings:
    """The inner loop."""

    inner_steps: int = 1
    """Gradient steps to each task; 0 is plain TRPO over the mixture of tasks."""
    step_size: float = 0.1
    """alpha, in parameter units per unit of gradient."""
    later_from: tuple[int, ...] = ()
    """Iterations from which on alpha is another: as a policy acts with less noise, its inner
    gradients grow."""
    later_step_sizes: tuple[float, ...] = ()
    """alpha from each of them on."""
    times_variance: bool = False
    """Whether alpha is these sizes times the variance of the policy's noise, exp(2 log_std) with
    the mean of log_std over actions, as theta has it in that iteration."""
    inner_loss: Literal["log-prob", "likelihood-ratio", "dice"] = "log-prob"
    """log-prob: the paper's. likelihood-ratio: ProMP's. dice: Loaded DiCE."""
    first_order: bool = False
    """Whether the outer gradient treats the inner one as a constant."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.inner_steps < 0:
            raise ValueError(f"adaptation.inner_steps must be at least 0, got {self.inner_steps}")
        if self.inner_steps > 100:
            raise ValueError(f"adaptation.inner_steps must be at most 100, got {self.inner_steps}")
        check_size("adaptation.step_size", self.step_size)
        for size in self.later_step_sizes:
            check_size("adaptation.later_step_sizes", size)
        check_schedule("adaptation", self.later_from, "later_step_sizes", self.later_step_sizes)

    def size_at(self, iteration: int) -> float:
        """Return the step size that is set for one iteration, before any variance."""
        return value_at(iteration, self.step_size, self.later_from, self.later_step_sizes)

    def at(self, iteration: int, theta: Params) -> AdaptationSettings:
        """Return these settings as they are in one iteration and for one theta, alpha for good.

        alpha is a number: no gradient goes through the variance.
        """
        alpha = self.size_at(iteration)
        if self.times_variance:
            # Kept in its range, whatever training makes of the noise.
            alpha = min(MAX_SIZE, max(math.ulp(0.0), alpha * noise_variance(theta)))
        return self.with_alpha(alpha)

    def with_alpha(self, alpha: float) -> AdaptationSettings:
        """Return these settings with one alpha for all iterations.

        Raises:
            ValueError: if it is out of its range.
        """
        return replace(
            self, step_size=alpha, later_from=(), later_step_sizes=(), times_variance=False
        )

    def inner_step(self, policy: GaussianPolicy, step_size: float | None = None) -> InnerStep:
        """Return the step these settings describe, with another step size if given."""
        return InnerStep(
            policy,
            INNER_LOSSES[self.inner_loss],
            self.step_size if step_size is None else step_size,
            self.first_order,
        )


class InnerStepError(ArithmeticError):
    """Nothing can be sampled with the parameters that an inner step has led to."""


class Collect(Protocol):
    """Samples a batch of episodes with the given parameters."""

    def __call__(self, params: Params, phase: int) -> Episodes:
        """Sample M tasks with parameters (M, ...); `phase` counts inner steps taken.

        Raises:
            InnerStepError: if after an inner step their actions are not finite.
        """


def update_bytes(policy: GaussianPolicy, steps: int, inner_steps: int) -> int:
    """Return the memory that an update takes for one task of so many steps, bytes.

    An upper bound, by a few to 25 per cent as measured, of what `MetaObjective` keeps and works in
    at once; 0 for a module of one's own, of which nothing is known.
    """
    if not isinstance(policy.network, Mlp):
        return 0
    inputs, *hidden, outputs = policy.network.sizes
    units = sum(hidden)
    # A Hessian keeps inputs, slopes, signals and bends of every layer, and the head's graph.
    kept = inner_steps * (inputs + 4 * units + 8 * outputs + 8) + inputs + 2 * units + 4 * outputs
    return 4 * steps * (kept + 4 * units)


def chunk_size(tasks: int, device: str, task_bytes: int = 0) -> int:
    """Return how many tasks go through together.

    On a CPU up to four: a few tasks' arrays fit in a core's cache where forty do not, and one
    task's are so small that threads wait for Python. Four, or the next smaller number that divides
    the tasks evenly, whatever the number of threads. On a GPU all, or as many of `task_bytes` each
    (0: not known) as fit in four fifths of its free memory, in chunks as alike as can be.
    """
    if device == "cpu":
        return next(n for n in (4, 3, 2, 1) if tasks % n == 0)
    if task_bytes == 0:
        return tasks
    fit = free_bytes(device) * 4 // 5 // task_bytes
    chunks = math.ceil(tasks / max(1, min(fit, tasks)))
    return math.ceil(tasks / chunks)


def free_bytes(device: str) -> int:
    """Return the memory of a GPU that is free, or held by torch and not in use, bytes."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def adapt_in_chunks(inner: InnerStep, params: Params, steps: Steps, chunks: Chunks) -> Params:
    """Take one inner step for M tasks, chunk by chunk."""

    def part(start: int, stop: int) -> Params:
        adapted = inner(of_tasks(params, start, stop), steps.of_tasks(start, stop))
        return {name: p.detach() for name, p in adapted.items()}

    return join_tasks(chunks.map(part, len(steps.weights)))


def estimate_in_chunks(
    episodes: Episodes, settings: AdvantageSettings, chunks: Chunks
) -> tuple[Tensor, Tensor]:
    """Return advantages (M, E, H) and explained variance (M,), task by task."""

    def of_chunk(start: int, stop: int) -> tuple[Tensor, Tensor]:
        return estimate_advantages(episodes.of_tasks(start, stop), settings)

    parts, explained = zip(*chunks.map(of_chunk, len(episodes.alive)), strict=True)
    advantages = torch.zeros(episodes.alive.shape, device=episodes.alive.device)
    # Slots that no task of a chunk used were left out.
    for chunk, rows in zip(
        parts, torch.split(advantages, [len(one) for one in parts]), strict=True
    ):
        rows[:, : chunk.shape[1]] = chunk
    return advantages, torch.cat(explained)


def metric_tasks(tasks: int, share: float) -> Tensor:
    """Return which tasks of a batch the metric is estimated from, (tasks,) bool.

    Those of whole chunks as they are on a CPU, evenly spaced, at least one, and together no fewer
    than that share. However large the chunks are in which they go through, they are the same.
    """
    size = chunk_size(tasks, "cpu")
    counts = [math.ceil(share * number - 1e-9) for number in range(tasks // size + 1)]
    chosen = torch.tensor([after > before for before, after in itertools.pairwise(counts)])
    chosen[0] = True
    return chosen.repeat_interleave(size)


class MetaObjective:
    """Algorithm 3's outer objective around theta, for the trust region.

    Surrogate: -mean over tasks and live steps of exp(log pi_{theta'(theta)} - log pi_old) A, with
    log pi_old as stored at sampling. Divergence: KL from the old adapted policies to the new, mean
    over all live steps pooled. Episodes and advantages stay fixed; theta' is adapted anew from
    every candidate.
    """

    def __init__(
        self,
        inner: InnerStep,
        points: Sequence[Params],
        batches: Sequence[Steps],
        outer: Steps,
        chunks: Chunks,
        linearise: Linearise = linearise,
        pool: int | None = None,
        keep: bool | None = None,
        chosen: Tensor | None = None,
        scale: float = 1.0,
    ) -> None:
        """Set up around one theta.

        Args:
            inner: the inner step.
            points: parameters (M, ...) before each inner step, and after the last.
            batches: the steps (M, S, ...) that each inner step learned from.
            outer: the steps sampled after the last inner step.
            chunks: how tasks are divided.
            linearise: makes the products of some tasks.
            pool: live steps that the divergence is the mean over; by default those of `outer`. More
                where these tasks are part of a batch.
            keep: whether the linearisations of all chunks are kept, or made again for each product;
                by default they are not on a GPU where there are several, since it is short of
                memory.
            chosen: which tasks the metric is estimated from, (M,) bool, by default all; cheaper by
                whole chunks. See `metric_tasks`.
            scale: what their sum is multiplied by to stand for all.
        """
        self._inner = inner
        self._points = points
        self._batches = batches
        # By chunk: shapes, and with them bits, depend on a chunk's own tasks alone.
        self._outer = chunks.map(outer.of_tasks, len(outer.weights))
        self._chunks = chunks
        self._like = {name: p[0] for name, p in points[0].items()}
        self._theta = flatten(self._like)
        self._tasks = len(outer.weights)
        self._chosen = None if chosen is None else chosen.to(outer.weights.device)
        self._scale = scale
        # Weights sum to 1 over a task; over the pool, a task counts by its live steps.
        live = (outer.weights > 0).sum(1, keepdim=True).to(outer.weights.dtype)
        self._share = live / (live.sum() if pool is None else float(pool))
        with torch.no_grad():
            self._old_means = chunks.map(self._means_of(points[-1]), self._tasks)
        self._old_log_std = log_std(points[-1]).detach()

        self._linearise = linearise
        if keep is None:
            keep = outer.weights.device.type == "cpu" or len(self._outer) == 1
        self._kept = chunks.map(self._linearised, self._tasks) if keep else None

    def _means_of(self, params: Params) -> Callable[[int, int], Tensor]:
        network = self._inner.policy.network

        def means(start: int, stop: int) -> Tensor:
            observations = self._outer[self._chunk(start)].observations
            return network.of_tasks(of_tasks(params, start, stop), observations)

        return means

    def _chunk(self, start: int) -> int:
        return start // (self._chunks.size or self._tasks)

    def _linearised(self, start: int, stop: int) -> Linearisation:
        """Linearise one chunk."""
        return self._linearise(
            self._inner,
            [of_tasks(p, start, stop) for p in self._points],
            [b.of_tasks(start, stop) for b in self._batches],
            self._outer[self._chunk(start)],
        )

    def _linear(self, start: int, stop: int) -> Linearisation:
        """Return a chunk's linearisation."""
        if self._kept is None:
            return self._linearised(start, stop)
        return self._kept[self._chunk(start)]

    def _pooled(self, start: int, stop: int) -> Tensor:
        """Return the weights of a chunk's steps in the divergence: a task counts by its steps."""
        return self._outer[self._chunk(start)].weights * self._share[start:stop]

    def gradient_terms(self) -> Tensor:
        """Return P' times each task's gradient of the surrogate at theta', (M, d)."""
        adapted = self._points[-1]

        def terms(start: int, stop: int) -> Tensor:
            point = {
                n: p.detach().requires_grad_() for n, p in of_tasks(adapted, start, stop).items()
            }
            outer = self._outer[self._chunk(start)]
            means = self._inner.policy.network.of_tasks(point, outer.observations)
            surrogate = self._surrogate(means, log_std(point), start, stop).sum()
            slopes = torch.autograd.grad(surrogate, list(point.values()))
            covectors = flatten(dict(zip(point, slopes, strict=True)), axes=1)
            return self._linear(start, stop).pull(covectors)

        return torch.cat(self._chunks.map(terms, self._tasks))

    def product_terms(self, vector: Tensor) -> Tensor:
        """Return each task's share of the KL's Hessian at theta times `vector` (d,), (M, d)."""
        return self._products(vector, None)

    def metric_terms(self, vector: Tensor) -> Tensor:
        """Return the same of the chosen tasks, scaled to stand for all, and 0 of others, (M, d)."""
        return self._products(vector, self._chosen) * self._scale

    def _products(self, vector: Tensor, chosen: Tensor | None) -> Tensor:
        """Return the share of each chosen task, 0 of others, (M, d)."""

        def terms(start: int, stop: int) -> Tensor:
            if chosen is not None and not bool(chosen[start:stop].any()):
                return vector.new_zeros(stop - start, len(vector))
            linear = self._linear(start, stop)
            pushed = linear.push(vector.expand(stop - start, -1))
            found = linear.pull(linear.fisher(pushed, self._pooled(start, stop)))
            return found if chosen is None else found * chosen[start:stop].unsqueeze(1)

        return torch.cat(self._chunks.map(terms, self._tasks))

    def evaluate_terms(self, candidate: Tensor) -> Tensor:
        """Return each task's surrogate, and its share of the KL, from a candidate (d,), (M, 2)."""
        theta = unflatten(candidate, self._like)
        # Where it is the present theta, theta' is known already.
        present = torch.equal(candidate, self._theta)

        def terms(start: int, stop: int) -> Tensor:
            params = broadcast(theta, stop - start)
            if present:
                params = of_tasks(self._points[-1], start, stop)
            for steps in () if present else self._batches:
                adapted = self._inner(params, steps.of_tasks(start, stop))
                params = {name: p.detach() for name, p in adapted.items()}
            with torch.no_grad():
                observations = self._outer[self._chunk(start)].observations
                means = self._inner.policy.network.of_tasks(params, observations)
                surrogate = self._surrogate(means, log_std(params), start, stop)
                kl = kl_divergence(
                    self._old_means[self._chunk(start)],
                    self._old_log_std[start:stop],
                    means,
                    log_std(params),
                )
                pooled = (self._pooled(start, stop) * kl).sum(1)
            return torch.stack([surrogate, pooled], 1)

        return torch.cat(self._chunks.map(terms, self._tasks))

    def gradient(self) -> Tensor:
        """Return P' times the surrogate's gradient at theta', mean over tasks, (d,)."""
        return sum_of(self.gradient_terms()) / self._tasks

    def product(self, vector: Tensor) -> Tensor:
        """Return the mean KL's Hessian at theta times `vector` (d,), (d,)."""
        return sum_of(self.product_terms(vector))

    def metric(self, vector: Tensor) -> Tensor:
        """Return an estimate of `product` from the chosen tasks, (d,)."""
        return sum_of(self.metric_terms(vector))

    def evaluate(self, candidate: Tensor) -> tuple[float, float]:
        """Return surrogate and KL after adapting from a candidate theta (d,)."""
        surrogate, kl = sum_of(self.evaluate_terms(candidate)).tolist()
        return surrogate / self._tasks, kl

    def _surrogate(self, means: Tensor, log_stds: Tensor, start: int, stop: int) -> Tensor:
        """Return the surrogate of each task of a chunk, (chunk,)."""
        outer = self._outer[self._chunk(start)]
        ratios = torch.exp(log_density(means, log_stds, outer.actions) - outer.log_probs)
        return -(outer.weights * ratios * outer.advantages).sum(1)


@dataclass(frozen=True)
class BatchReport:
    """One batch of episodes, summed up task by task; on the CPU."""

    returns: Tensor
    """(M,): mean undiscounted return of a task's episodes."""
    live_steps: Tensor
    """(M,) int64."""
    sampled: Tensor
    """(M,) int64: episodes."""
    diverged: Tensor
    """(M,) int64: those whose simulation broke down."""
    explained_variance: Tensor
    """(M,): of the returns, by the baseline."""

    @classmethod
    def of(cls, episodes: Episodes, explained_variance: Tensor) -> BatchReport:
        """Sum up a batch."""
        return cls(
            returns=episodes.mean_returns().cpu(),
            live_steps=episodes.live_steps.cpu(),
            sampled=(episodes.diverged | episodes.alive[:, :, 0]).sum(1).cpu(),
            diverged=episodes.diverged.sum(1).cpu(),
            explained_variance=explained_variance.cpu(),
        )


@dataclass(frozen=True)
class Adapted:
    """What tasks were sampled and adapted to."""

    points: tuple[Params, ...]
    """Parameters (M, ...) before each inner step, and after the last."""
    batches: tuple[Steps, ...]
    """The steps (M, S, ...) of each batch."""
    episodes: tuple[Episodes, ...]
    """Before adaptation, after one inner step, and so on: inner_steps + 1 batches, or fewer
    where an inner step was not finite."""
    explained_variance: tuple[Tensor, ...]
    """(M,) of each batch's baseline."""
    seconds: float
    """Of sampling."""

    def reports(self) -> tuple[BatchReport, ...]:
        """Return each batch summed up."""
        pairs = zip(self.episodes, self.explained_variance, strict=True)
        return tuple(BatchReport.of(*pair) for pair in pairs)

    def objective(
        self,
        inner: InnerStep,
        chunks: Chunks,
        pool: int | None = None,
        *,
        metric_share: float = 1.0,
        whole: int | None = None,
        first: int = 0,
    ) -> MetaObjective:
        """Return the outer objective of these tasks.

        Args:
            inner: the inner step.
            chunks: how tasks are divided.
            pool: live steps of the whole batch, if these tasks are part of one.
            metric_share: of the batch's tasks in estimates of its metric.
            whole: tasks in the whole batch, if these are part of one.
            first: the first one's index in it.
        """
        tasks = len(self.batches[-1].weights)
        all_chosen = metric_tasks(whole or tasks, metric_share)
        return MetaObjective(
            inner,
            self.points,
            self.batches[:-1],
            self.batches[-1],
            chunks,
            pool=pool,
            chosen=all_chosen[first : first + tasks],
            scale=len(all_chosen) / int(all_chosen.sum()),
        )


def sample_and_adapt(
    theta: Params,
    inner: InnerStep,
    inner_steps: int,
    collect: Collect,
    tasks: int,
    *,
    advantages: AdvantageSettings,
    chunks: Chunks,
    clock: Callable[[], float],
) -> Adapted:
    """Sample `tasks` tasks with theta, adapt, sample again, and so on (Algorithm 3, lines 4 to 9).

    Ends early, with as many batches as there are, where an inner step is not finite.
    """
    points, batches = [broadcast(theta, tasks)], []
    sampled: list[Episodes] = []
    fits: list[Tensor] = []
    sampling = 0.0
    for phase in range(inner_steps + 1):
        began = clock()
        try:
            if phase and not all(bool(torch.isfinite(p).all()) for p in points[-1].values()):
                raise InnerStepError
            episodes = collect(points[-1], phase)
        except InnerStepError:
            break
        sampling += clock() - began
        estimated, explained = estimate_in_chunks(episodes, advantages, chunks)
        batches.append(pack(episodes, estimated))
        sampled.append(episodes)
        fits.append(explained)
        if phase < inner_steps:
            points.append(adapt_in_chunks(inner, points[-1], batches[-1], chunks))
    return Adapted(tuple(points), tuple(batches), tuple(sampled), tuple(fits), sampling)


@dataclass(frozen=True)
class MetaReport:
    """What one meta-iteration saw and did."""

    batches: tuple[BatchReport, ...]
    """Before adaptation, after one inner step, and so on: inner_steps + 1, or fewer where an inner
    step was not finite."""
    step: Report
    seconds_sampling: float
    episodes: tuple[Episodes, ...] = ()
    """The batches themselves, where they were sampled in this process."""

    @classmethod
    def of(cls, adapted: Adapted, step: Report) -> MetaReport:
        """Sum up an iteration of this process."""
        return cls(adapted.reports(), step, adapted.seconds, adapted.episodes)


def not_finite() -> Report:
    """Return the report of an update that was refused since an inner step was not finite."""
    return Report(math.nan, math.nan, 0.0, INNER_STEP_NOT_FINITE, 0, math.nan)


def meta_iteration(
    theta: Params,
    policy: GaussianPolicy,
    collect: Collect,
    tasks: int,
    *,
    adaptation: AdaptationSettings,
    advantages: AdvantageSettings,
    trust_region: TrustRegionSettings,
    chunks: Chunks,
    clock: Callable[[], float],
    earlier: Tensor | None = None,
) -> tuple[Params, MetaReport]:
    """Return theta after one iteration of Algorithm 3 over `tasks` tasks, and what happened.

    A refused step returns the very same theta. `earlier` is where the outer step before went,
    (d,), for momentum; see `trust_region_step`.
    """
    inner = adaptation.inner_step(policy)
    adapted = sample_and_adapt(
        theta,
        inner,
        adaptation.inner_steps,
        collect,
        tasks,
        advantages=advantages,
        chunks=chunks,
        clock=clock,
    )
    if len(adapted.episodes) <= adaptation.inner_steps:
        return theta, MetaReport.of(adapted, not_finite())
    objective = adapted.objective(inner, chunks, metric_share=trust_region.metric_share)
    updated, report = outer_step(theta, objective, trust_region, earlier)
    return updated, MetaReport.of(adapted, report)


def outer_step(
    theta: Params,
    objective: Objective,
    settings: TrustRegionSettings,
    earlier: Tensor | None = None,
) -> tuple[Params, Report]:
    """Step theta within the trust region; a refused step returns the very same theta."""
    old = flatten(theta)
    new, report = trust_region_step(objective, old, settings, earlier)
    return (theta if new is old else unflatten(new, theta)), report
