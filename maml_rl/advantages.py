"""Advantages: discounted returns less a linear feature baseline, for all tasks at once.

The baseline is Duan et al. 2016 (arXiv:1604.06778), appendix 2: a ridge fit, one for each task
and each batch of episodes; the advantages are Schulman et al. 2016 (arXiv:1506.02438), eq. 16.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from maml_rl.episodes import Episodes

REGULARISATION = 1e-5
TRIES = 5


@dataclass(frozen=True, kw_only=True)
class AdvantageSettings:
    """How rewards become advantages."""

    discount: float = 0.99
    """gamma: weight of a reward one step later."""
    gae_lambda: float = 1.0
    """lambda of generalised advantage estimation; 1 is returns less values."""

    def __post_init__(self) -> None:
        """Check ranges."""
        for name in ("discount", "gae_lambda"):
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"advantages.{name} must be between 0 and 1, got {value}")


def discounted_sums(values: Tensor, factor: float) -> Tensor:
    """Return sum over t' >= t of factor^(t' - t) values[t'] along the last axis."""
    sums = torch.empty_like(values)
    running = torch.zeros_like(values[..., 0])
    for t in reversed(range(values.shape[-1])):
        running = values[..., t] + factor * running
        sums[..., t] = running
    return sums


def baseline_features(observations: Tensor, alive: Tensor) -> Tensor:
    """Return [o, o^2, t/100, (t/100)^2, (t/100)^3, 1] with o clipped to +-10; 0 on dead steps.

    Args:
        observations: (M, E, H, O).
        alive: (M, E, H) bool.

    Returns:
        (M, E, H, 2 O + 4) float64: the ant's rotation entries are collinear to 1e-12, which
        float32 cannot solve.
    """
    clipped = observations.double().clamp(-10.0, 10.0)
    H = alive.shape[2]
    time = torch.arange(H, dtype=torch.float64, device=alive.device) / 100.0
    powers = torch.stack([time, time**2, time**3, torch.ones_like(time)], 1)
    features = torch.cat([clipped, clipped.square(), powers.expand(*alive.shape, 4)], -1)
    return torch.where(alive.unsqueeze(-1), features, 0.0)


def fit_baseline(features: Tensor, returns: Tensor) -> Tensor:
    """Fit every task's values to its returns by ridge regression, in one batched solve.

    Where a solution is not finite the regularisation is multiplied by 10, up to five times;
    where none is, the baseline is 0.

    Args:
        features: (M, S, D) float64, rows of 0 where nothing is to be fitted.
        returns: (M, S) float64.

    Returns:
        (M, D) float64.
    """
    gram = features.mT @ features
    moment = features.mT @ returns.unsqueeze(-1)
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    solution = torch.zeros_like(moment)
    open_tasks = torch.ones(len(gram), dtype=torch.bool, device=gram.device)
    regularisation = REGULARISATION
    for _ in range(TRIES):
        tried, info = torch.linalg.solve_ex(gram + regularisation * identity, moment)
        good = open_tasks & (info == 0) & torch.isfinite(tried).all(-1).all(-1)
        solution = torch.where(good[:, None, None], tried, solution)
        open_tasks &= ~good
        if not bool(open_tasks.any()):
            break
        regularisation *= 10.0
    return solution.squeeze(-1)


def estimate_advantages(episodes: Episodes, settings: AdvantageSettings) -> tuple[Tensor, Tensor]:
    """Return advantages with mean 0 and standard deviation 1 over each task's live steps.

    Args:
        episodes: E episodes of M tasks; what dead steps hold is not read.
        settings: discount and lambda.

    Returns:
        Advantages (M, E, H) float32, 0 on dead steps, and the baseline's explained variance of
        the returns, (M,): 1 is a perfect fit, 0 no better than the mean.
    """
    alive = episodes.alive
    M, E, H = alive.shape
    rewards = torch.where(alive, episodes.rewards, 0.0).double()
    returns = discounted_sums(rewards, settings.discount)
    features = baseline_features(episodes.observations, alive).reshape(M, E * H, -1)
    weights = fit_baseline(features, returns.reshape(M, E * H))
    # Rows of dead steps are 0, and so are their values: V after the last step is 0.
    values = (features @ weights.unsqueeze(-1)).reshape(M, E, H)
    after = torch.cat([values[..., 1:], torch.zeros_like(values[..., :1])], -1)
    errors = rewards + settings.discount * after - values
    raw = discounted_sums(errors, settings.discount * settings.gae_lambda)
    return normalise(raw, alive).float(), explained_variance(values, returns, alive)


def live_moments(values: Tensor, alive: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance (divisor n) over each task's live steps, each (M, 1, 1)."""
    count = alive.sum((1, 2), keepdim=True).clamp(min=1)
    mean = torch.where(alive, values, 0.0).sum((1, 2), keepdim=True) / count
    spread = torch.where(alive, (values - mean).square(), 0.0)
    return mean, spread.sum((1, 2), keepdim=True) / count


def normalise(values: Tensor, alive: Tensor) -> Tensor:
    """Return (values - mean) / (std + 1e-8) over each task's live steps, 0 on dead ones."""
    mean, variance = live_moments(values, alive)
    return torch.where(alive, (values - mean) / (variance.sqrt() + 1e-8), 0.0)


def explained_variance(values: Tensor, returns: Tensor, alive: Tensor) -> Tensor:
    """Return 1 - var(returns - values) / var(returns) of each task, (M,); 0 if returns are flat."""
    _, left = live_moments(returns - values, alive)
    _, total = live_moments(returns, alive)
    flat = total <= 1e-12
    return torch.where(flat, 0.0, 1.0 - left / torch.where(flat, 1.0, total)).flatten()
