"""A trust-region step: conjugate gradient, step length, line search. Knows no RL.

Schulman et al. 2015 (arXiv:1502.05477), appendix C. Minimises a surrogate within a bound on a
divergence whose Hessian at the present point is given by products with vectors. Momentum is
Polyak's heavy ball (1964) with natural gradients: a step goes along the sum of this point's and of
earlier ones that fade.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from maml_rl.schedule import check_schedule, check_size, value_at


@dataclass(frozen=True, kw_only=True)
class TrustRegionSettings:
    """The outer step."""

    max_kl: float = 0.01
    """Largest mean KL divergence from the old adapted policies to the new, nats."""
    later_from: tuple[int, ...] = ()
    """Iterations from which on max_kl is another: near its best a policy loses by long steps, which
    are mostly noise."""
    later_max_kls: tuple[float, ...] = ()
    """max_kl from each of them on."""
    cg_iterations: int = 10
    """Conjugate gradient iterations, each one Fisher product."""
    metric_share: float = 1.0
    """Share of the tasks that these products are of; 1 is the paper's. At least so many, in groups
    of four where that divides the tasks; the gradient, one product for the step's length, and the
    line search have all tasks. For policies without an inner step: of few tasks adapted to it makes
    the step worse. Saves nothing where all go through together, as on a GPU."""
    damping: float = 1e-5
    """Multiple of the identity added to the Fisher matrix."""
    backtracks: int = 15
    """Step lengths that the line search tries."""
    backtrack_ratio: float = 0.8
    """Each step length over the one before."""
    momentum: float = 0.0
    """Share of the direction of the step before which is added to this natural gradient; 0 is the
    paper's. With most of a batch's gradient being noise, .9 averages ten batches or so. Costs a
    Fisher product."""

    def __post_init__(self) -> None:
        """Check ranges."""
        check_size("trust_region.max_kl", self.max_kl)
        for kl in self.later_max_kls:
            check_size("trust_region.later_max_kls", kl)
        check_schedule("trust_region", self.later_from, "later_max_kls", self.later_max_kls)
        if self.cg_iterations < 1:
            raise ValueError(
                f"trust_region.cg_iterations must be at least 1, got {self.cg_iterations}"
            )
        if not 0 < self.metric_share <= 1:
            raise ValueError(
                f"trust_region.metric_share must be above 0 and at most 1, got {self.metric_share}"
            )
        if not (math.isfinite(self.damping) and self.damping >= 0):
            raise ValueError(f"trust_region.damping must be at least 0, got {self.damping}")
        if self.backtracks < 1:
            raise ValueError(f"trust_region.backtracks must be at least 1, got {self.backtracks}")
        if not 0 < self.backtrack_ratio < 1:
            raise ValueError(
                f"trust_region.backtrack_ratio must be between 0 and 1, got {self.backtrack_ratio}"
            )
        if not 0 <= self.momentum < 1:
            raise ValueError(
                f"trust_region.momentum must be at least 0 and below 1, got {self.momentum}"
            )
        for name, most in (
            ("cg_iterations", 10_000),
            ("damping", 1e6),
            ("backtracks", 10_000),
        ):
            if getattr(self, name) > most:
                raise ValueError(
                    f"trust_region.{name} must be at most {most:g}, got {getattr(self, name)}"
                )

    def at(self, iteration: int) -> TrustRegionSettings:
        """Return these settings as they are in one iteration, its max_kl for good."""
        kl = value_at(iteration, self.max_kl, self.later_from, self.later_max_kls)
        return replace(self, max_kl=kl, later_from=(), later_max_kls=())


class Refusal(StrEnum):
    """Why a step was refused."""

    LOSS_NOT_FINITE = "surrogate or gradient not finite"
    GRADIENT_ZERO = "gradient is zero"
    PRODUCT_NOT_FINITE = "Fisher product not finite"
    CURVATURE_NOT_POSITIVE = "curvature not positive"
    STEP_NOT_FINITE = "step not finite"
    CANDIDATE_NOT_FINITE = "surrogate or KL not finite"
    KL_TOO_LARGE = "KL too large"
    DID_NOT_FALL = "surrogate did not fall"


class Objective(Protocol):
    """What a trust-region step asks for, around one point theta (d,)."""

    def gradient(self) -> Tensor:
        """Return the surrogate's gradient at theta, (d,)."""

    def product(self, vector: Tensor) -> Tensor:
        """Return the divergence's Hessian at theta times `vector` (d,), (d,)."""

    def metric(self, vector: Tensor) -> Tensor:
        """Return an estimate of `product` that costs less, (d,)."""

    def evaluate(self, candidate: Tensor) -> tuple[float, float]:
        """Return surrogate and divergence at a candidate (d,)."""


@dataclass(frozen=True)
class Report:
    """What became of a step."""

    surrogate_before: float
    surrogate_after: float
    """At the accepted point; the old value if the step was refused."""
    kl: float
    """From the old point to the accepted one; 0 if the step was refused."""
    refused_because: str
    """Empty if the step was accepted."""
    backtracks: int
    """Step lengths tried and turned down."""
    cg_residual: float
    """|b - A x| / |b| after the last iteration."""
    followed: Tensor | None = field(default=None, compare=False, repr=False)
    """(d,) float64: the direction taken, with what momentum adds of earlier ones, before its length
    was found; None where none could be found."""

    @property
    def accepted(self) -> bool:
        """Whether the parameters changed."""
        return not self.refused_because


def conjugate_gradient(
    product: Callable[[Tensor], Tensor], target: Tensor, iterations: int
) -> tuple[Tensor, Tensor, Refusal | None]:
    """Solve A x = b for symmetric positive definite A, given by its products.

    Args:
        product: maps (d,) float64 to A times it.
        target: b, (d,) float64.
        iterations: at most so many products; fewer if the residual vanishes.

    Returns:
        x (d,), the residual b - A x (d,), and why the products cannot be those of such a
        matrix, or None; x is then what was found before.
    """
    x = torch.zeros_like(target)
    residual = target.clone()
    direction = target.clone()
    squared = residual.dot(residual)
    for _ in range(iterations):
        if float(squared) <= 1e-20 * float(target.dot(target)):
            break
        image = product(direction)
        curvature = direction.dot(image)
        if not math.isfinite(float(curvature)):
            return x, residual, Refusal.PRODUCT_NOT_FINITE
        if not float(curvature) > 0:
            return x, residual, Refusal.CURVATURE_NOT_POSITIVE
        length = squared / curvature
        x = x + length * direction
        residual = residual - length * image
        previous, squared = squared, residual.dot(residual)
        direction = residual + (squared / previous) * direction
    return x, residual, None


class FullStep(NamedTuple):
    """The step that `max_kl` allows."""

    step: Tensor
    """(d,) float64."""
    followed: Tensor
    """(d,) float64: its direction, as it was found."""
    residual: float
    """Conjugate gradient's |b - A x| / |b|."""
    complaint: Refusal | None
    """Why the step is not to be taken."""


def full_step(
    objective: Objective,
    gradient: Tensor,
    settings: TrustRegionSettings,
    dtype: torch.dtype,
    earlier: Tensor | None = None,
) -> FullStep:
    """Return the step against a gradient, by the divergence's metric, that `max_kl` allows.

    Args:
        objective: whose metric.
        gradient: (d,) float64, finite and not 0.
        settings: how.
        dtype: of the vectors that the objective takes.
        earlier: the direction of the step before, (d,), if momentum is to carry it on.
    """

    def damped(multiply: Callable[[Tensor], Tensor], vector: Tensor) -> Tensor:
        return multiply(vector.to(dtype)).double() + settings.damping * vector

    estimated = settings.metric_share < 1
    multiply = partial(damped, objective.metric if estimated else objective.product)
    step, rest, complaint = conjugate_gradient(multiply, -gradient, settings.cg_iterations)
    residual = float(rest.norm()) / float(gradient.norm())
    if complaint is not None:
        return FullStep(step, step, residual, complaint)
    carried = earlier if settings.momentum else None
    if carried is not None:
        step = step + settings.momentum * carried.double()
    # Of this natural gradient alone s'As costs no further product: A s = b - residual. An estimate
    # would have it too small, since the step makes use of its gaps.
    image = (
        damped(objective.product, step) if estimated or carried is not None else -gradient - rest
    )
    curvature = float(step.dot(image))
    if not (math.isfinite(curvature) and curvature > 0):
        return FullStep(step, step, residual, Refusal.STEP_NOT_FINITE)
    return FullStep(math.sqrt(2.0 * settings.max_kl / curvature) * step, step, residual, None)


def trust_region_step(
    objective: Objective,
    theta: Tensor,
    settings: TrustRegionSettings,
    earlier: Tensor | None = None,
) -> tuple[Tensor, Report]:
    """Step from theta (d,) along the natural gradient as far as the divergence allows.

    Accepts only a point where the surrogate falls and the divergence is at most `max_kl`.
    Otherwise the very same theta comes back, and the report says why.

    Args:
        objective: what falls.
        theta: where, (d,).
        settings: how.
        earlier: the direction of the step before, (d,), if momentum is to carry it on.
    """
    before, _ = objective.evaluate(theta)
    gradient = objective.gradient().double()

    def refused(
        reason: Refusal,
        backtracks: int = 0,
        residual: float = math.nan,
        followed: Tensor | None = None,
    ) -> Report:
        return Report(before, before, 0.0, reason, backtracks, residual, followed)

    if not (math.isfinite(before) and bool(torch.isfinite(gradient).all())):
        return theta, refused(Refusal.LOSS_NOT_FINITE)
    if float(gradient.norm()) == 0.0:
        return theta, refused(Refusal.GRADIENT_ZERO)
    full, followed, residual, complaint = full_step(
        objective, gradient, settings, theta.dtype, earlier
    )
    if complaint is not None:
        return theta, refused(complaint, residual=residual)

    surrogate, kl = math.nan, math.nan
    for tried in range(settings.backtracks):
        candidate = theta + (settings.backtrack_ratio**tried * full).to(theta.dtype)
        surrogate, kl = objective.evaluate(candidate)
        if surrogate < before and kl <= settings.max_kl:
            return candidate, Report(before, surrogate, kl, "", tried, residual, followed)
    reason = Refusal.KL_TOO_LARGE if surrogate < before else Refusal.DID_NOT_FALL
    if not (math.isfinite(surrogate) and math.isfinite(kl)):
        reason = Refusal.CANDIDATE_NOT_FINITE
    return theta, refused(reason, settings.backtracks, residual, followed)
