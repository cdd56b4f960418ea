"""What a sampler returns, and what losses read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Episodes:
    """E episodes of up to H steps for each of M tasks; entries after an end are not defined."""

    observations: Tensor
    """(M, E, H, O) float32, before the step."""
    actions: Tensor
    """(M, E, H, A) float32, unclipped, in the policy's unit."""
    rewards: Tensor
    """(M, E, H) float32."""
    alive: Tensor
    """(M, E, H) bool: the step was taken from a live state, and its world did not diverge in it.
    In every episode true up to its last step and false from there on."""
    log_probs: Tensor
    """(M, E, H) float32: log pi(a | o) when sampled."""
    measures: Tensor
    """(M, E, H, Q) float32: the family's measures, for reports."""
    diverged: Tensor
    """(M, E) bool: the episode was cut short because its world diverged."""

    def of_tasks(self, start: int, stop: int) -> Episodes:
        """Return the episodes of tasks start to stop - 1, without slots after their last.

        So what is calculated from them does not depend on how many episodes other tasks had.
        """
        slots = self.alive.shape[1]
        if stop - start < len(self.alive):
            used = (self.alive[start:stop, :, 0] | self.diverged[start:stop]).any(0)
            slots = int(used.nonzero().max()) + 1 if bool(used.any()) else 0
        return Episodes(**{name: v[start:stop, :slots] for name, v in vars(self).items()})

    def each(self) -> Iterator[Episodes]:
        """Yield one task's episodes after the other's.

        A sum over padding that another task needs would come to other last bits.
        """
        for task in range(len(self.alive)):
            yield self.of_tasks(task, task + 1)

    @property
    def live_steps(self) -> Tensor:
        """(M,) int64: live steps of each task."""
        return self.alive.flatten(1).sum(1)

    def returns(self) -> Tensor:
        """Undiscounted return of each episode, (M, E); NaN for slots that held no episode."""
        total = torch.where(self.alive, self.rewards, 0.0).sum(2)
        return torch.where(self.alive[:, :, 0], total, torch.nan)

    def mean_returns(self) -> Tensor:
        """Mean undiscounted return of each task's episodes, (M,)."""
        return torch.cat([one.returns().nanmean(1) for one in self.each()])

    def mean_measures(self) -> Tensor:
        """Mean of each measure over a task's live steps, (M, Q)."""
        totals = [
            torch.where(one.alive.unsqueeze(-1), one.measures, 0.0).sum((1, 2))
            for one in self.each()
        ]
        return torch.cat(totals) / self.live_steps.clamp(min=1).unsqueeze(-1)


class Steps(NamedTuple):
    """The live steps of M tasks, packed in order of episode and time; padding has weight 0."""

    observations: Tensor
    """(M, S, O)."""
    actions: Tensor
    """(M, S, A)."""
    advantages: Tensor
    """(M, S)."""
    log_probs: Tensor
    """(M, S): log pi(a | o) when sampled."""
    weights: Tensor
    """(M, S): 1 / (live steps of the task), so that they sum to 1; 0 on padding."""
    first: Tensor
    """(M, S) int64: index along S of the first step of the same episode."""

    def of_tasks(self, start: int, stop: int) -> Steps:
        """Return the steps of tasks start to stop - 1, without padding that none of them needs.

        So what is calculated from them does not depend on how many steps other tasks had.
        """
        width = self.weights.shape[1]
        if stop - start < len(self.weights):
            width = int((self.weights[start:stop] > 0).sum(1).max())
        return Steps(*(t[start:stop, :width] for t in self))


def pack(episodes: Episodes, advantages: Tensor) -> Steps:
    """Keep live steps only, so that padding costs nothing from here on.

    Args:
        episodes: E episodes of M tasks.
        advantages: (M, E, H); entries of dead steps are not read.

    Raises:
        ValueError: if a task has no live step.
    """
    M, E, H = episodes.alive.shape
    live = episodes.live_steps
    if bool((live == 0).any()):
        raise ValueError("a task has no live step: every one of its worlds diverged at once")
    S = int(live.max())
    alive = episodes.alive.reshape(M, E * H)
    # A stable sort puts live steps first and keeps their order.
    order = torch.argsort(~alive, dim=1, stable=True)[:, :S]
    lengths = episodes.alive.sum(2)
    starts = lengths.cumsum(1) - lengths
    used = torch.arange(S, device=live.device) < live.unsqueeze(1)
    nothing_died = bool(alive.all())

    def take(values: Tensor) -> Tensor:
        flat = values.reshape(M, E * H, *values.shape[3:])
        if nothing_died:
            return flat
        index = order.reshape(M, S, *[1] * (flat.ndim - 2)).expand(M, S, *flat.shape[2:])
        mask = used.reshape(M, S, *[1] * (flat.ndim - 2))
        return torch.where(mask, flat.gather(1, index), torch.zeros((), dtype=flat.dtype))

    return Steps(
        observations=take(episodes.observations),
        actions=take(episodes.actions),
        advantages=take(advantages),
        log_probs=take(episodes.log_probs),
        weights=torch.where(used, 1.0 / live.unsqueeze(1), 0.0).to(advantages.dtype),
        first=torch.where(used, starts.gather(1, order // H), 0),
    )
