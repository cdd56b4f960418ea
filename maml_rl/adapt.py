"""Inner loop: one gradient step on every task of the meta-batch at once.

Knows nothing of reinforcement learning. A loss is any scalar function of one
task's parameters and data, so the supervised mode adapts with these same lines.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor
from torch.func import grad, vmap

Params = dict[str, Tensor]
"""Parameters by name: theta, each tensor (...), or those of M tasks, each (M, ...)."""

Data = TypeVar("Data")


def adapt(
    loss: Callable[[Params, Data], Tensor],
    params: Params,
    data: Data,
    step_size: float | Mapping[str, float | Tensor],
    *,
    first_order: bool = False,
) -> Params:
    """Step every task down its own loss: theta_i' = theta_i - step_size * grad loss_i(theta_i).

    Pure and differentiable in `params`, through the step itself unless
    `first_order`, which treats the inner gradient as a constant (Finn et al.
    2017, arXiv:1703.03400, section 5.2).

    Args:
        loss: maps one task's parameters and data, without task axis, to a scalar.
        params: parameters of M tasks, each tensor (M, ...).
        data: what the loss reads, each tensor (M, ...).
        step_size: alpha > 0, in parameter units per unit of gradient. Or one by name, of which a
            tensor, shaped as the parameter or a scalar, may be learned and have any sign (Meta-SGD,
            Li et al. 2017, arXiv:1707.09835); parameters without one are not adapted (as in
            ANIL, Raghu et al. 2020, arXiv:1909.09157).
        first_order: whether the derivative of the step leaves out the loss's curvature.

    Returns:
        Adapted parameters, with the names and shapes of `params`.

    Raises:
        ValueError: if a step size is not positive, or is of no parameter.
    """
    sizes = step_size if isinstance(step_size, Mapping) else dict.fromkeys(params, step_size)
    for name, size in sizes.items():
        if name not in params:
            raise ValueError(f"there is a step size for {name!r}, which is no parameter")
        if not isinstance(size, Tensor) and not size > 0:
            raise ValueError(f"step_size must be positive, got {size}")

    def step(theta: Params, task: Data) -> Params:
        moving = {name: theta[name] for name in sizes}
        gradient = grad(lambda some: loss(theta | some, task))(moving)
        if first_order:
            gradient = {name: g.detach() for name, g in gradient.items()}
        return theta | {name: p - sizes[name] * gradient[name] for name, p in moving.items()}

    return vmap(step)(params, data)


def broadcast(theta: Params, tasks: int) -> Params:
    """Give every one of `tasks` tasks the same parameters, (tasks, ...), without a copy."""
    return {name: p.expand(tasks, *p.shape) for name, p in theta.items()}


def flatten(params: Params, *, axes: int = 0) -> Tensor:
    """Join parameters into one vector (d,), or into (M, d) with `axes=1` leading task axis."""
    return torch.cat([p.reshape(*p.shape[:axes], -1) for p in params.values()], axes)


def unflatten(vector: Tensor, like: Params) -> Params:
    """Split vectors (..., d) into views named and shaped as theta: the inverse of `flatten`."""
    params, start = {}, 0
    for name, p in like.items():
        size = p.numel()
        params[name] = vector[..., start : start + size].reshape((*vector.shape[:-1], *p.shape))
        start += size
    return params
