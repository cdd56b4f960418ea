"""The meta-step linearised once, for products with the trust region's Fisher matrix.

Where the new adapted policies equal the old ones their KL has zero gradient, so its Hessian over
theta is exactly P' J' F J P: J is the adapted policy's Jacobian, F the Gaussian's diagonal Fisher
matrix (1/std^2 for a mean, 2 for a log std) and P = dtheta'/dtheta, a product of I - alpha H_k,
one symmetric inner Hessian a step; first-order MAML takes P = I.

Two ways to multiply. `GraphLinearisation` differentiates through `adapt` itself and serves any
policy and inner loss. `MlpLinearisation` writes forward and backward tangents of the perceptron
out as batched matrix products (Pearlmutter 1994's R-operator); only the head, from means to loss,
is left to autograd. Tests hold the second to the first, and both to torch.func.hessian.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.func import vmap

from maml_rl.adapt import Params, adapt, flatten, unflatten
from maml_rl.episodes import Steps
from maml_rl.losses import InnerLoss
from maml_rl.policy import LOG_STD, MIN_LOG_STD, GaussianPolicy, Mlp, log_density, log_std


@dataclass(frozen=True)
class InnerStep:
    """How one inner gradient step is taken."""

    policy: GaussianPolicy
    loss: InnerLoss
    step_size: float
    first_order: bool

    def __call__(self, params: Params, steps: Steps) -> Params:
        """Adapt M tasks' parameters (M, ...) to their steps (M, S, ...)."""

        def task_loss(theta: Params, task: Steps) -> Tensor:
            log_probs = self.policy.log_prob(theta, task.observations, task.actions)
            return self.loss(log_probs, task)

        return adapt(task_loss, params, steps, self.step_size, first_order=self.first_order)


class Linearisation(Protocol):
    """The meta-step of some tasks around theta. Vectors are one a task: (M, d)."""

    def push(self, vectors: Tensor) -> Tensor:
        """Return P v for each task."""

    def pull(self, covectors: Tensor) -> Tensor:
        """Return P' w for each task."""

    def fisher(self, vectors: Tensor, weights: Tensor) -> Tensor:
        """Return J' F J u for each task, its steps weighted by `weights` (M, S)."""


class GraphLinearisation:
    """Through the graph of `adapt` and of the policy, built once and kept; reverse mode only."""

    def __init__(self, inner: InnerStep, theta: Params, batches: Sequence[Steps], outer: Steps):
        start = {name: p.detach().clone().requires_grad_() for name, p in theta.items()}
        adapted = start
        for steps in batches:
            adapted = inner(adapted, steps)
        self._start = start
        self._identity = not batches
        self._adapted = adapted
        # P' w as a graph that is linear in w: differentiating it in w gives P v.
        self._w = {n: torch.zeros_like(p, requires_grad=True) for n, p in adapted.items()}
        self._pulled = None if self._identity else self._vjp(adapted, start, self._w)
        # The same for J, around adapted parameters of their own.
        point = {name: p.detach().requires_grad_() for name, p in adapted.items()}
        self._point = point
        self._means = vmap(inner.policy.network)(point, outer.observations)
        self._log_std = log_std(point)
        self._dm = torch.zeros_like(self._means, requires_grad=True)
        self._ds = torch.zeros_like(self._log_std, requires_grad=True)
        self._output_pulled = torch.autograd.grad(
            (self._means, self._log_std),
            list(point.values()),
            (self._dm, self._ds),
            create_graph=True,
        )

    @staticmethod
    def _vjp(outputs: Params, inputs: Params, cotangents: Params) -> tuple[Tensor, ...]:
        return torch.autograd.grad(
            list(outputs.values()),
            list(inputs.values()),
            list(cotangents.values()),
            create_graph=True,
            materialize_grads=True,
        )

    def _split(self, vectors: Tensor) -> list[Tensor]:
        like = {name: p[0] for name, p in self._start.items()}
        return list(unflatten(vectors, like).values())

    def _join(self, parts: Sequence[Tensor]) -> Tensor:
        return flatten(dict(zip(self._start, parts, strict=True)), axes=1)

    def push(self, vectors: Tensor) -> Tensor:
        """Return P v (M, d)."""
        if self._pulled is None:
            return vectors
        return self._join(
            torch.autograd.grad(
                self._pulled,
                list(self._w.values()),
                self._split(vectors),
                retain_graph=True,
                materialize_grads=True,
            )
        )

    def pull(self, covectors: Tensor) -> Tensor:
        """Return P' w (M, d)."""
        if self._identity:
            return covectors
        return self._join(
            torch.autograd.grad(
                list(self._adapted.values()),
                list(self._start.values()),
                self._split(covectors),
                retain_graph=True,
                materialize_grads=True,
            )
        )

    def fisher(self, vectors: Tensor, weights: Tensor) -> Tensor:
        """Return J' F J u (M, d)."""
        dm, ds = torch.autograd.grad(
            self._output_pulled,
            (self._dm, self._ds),
            self._split(vectors),
            retain_graph=True,
            materialize_grads=True,
        )
        precision = torch.exp(-2.0 * self._log_std.detach()).unsqueeze(-2)
        dm = weights.unsqueeze(-1) * precision * dm
        ds = 2.0 * weights.sum(-1, keepdim=True) * ds
        return self._join(
            torch.autograd.grad(
                (self._means, self._log_std),
                list(self._point.values()),
                (dm, ds),
                retain_graph=True,
                materialize_grads=True,
            )
        )


NARROW = 16
"""Below so many columns a product is several times faster when written transposed."""


def times(left: Tensor, right: Tensor) -> Tensor:
    """Return left (M, S, I) @ right (M, I, O); narrow results lie column by column."""
    if right.shape[-1] < NARROW:
        return torch.bmm(right.mT, left.mT).mT
    return torch.bmm(left, right)


def add_times(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Add left (M, S, I) @ right (M, I, O) to `total` in place, and return it."""
    if right.shape[-1] < NARROW:
        total.mT.baddbmm_(right.mT, left.mT)
        return total
    return total.baddbmm_(left, right)


def bias(params: Params, layer: int) -> Tensor:
    """Return one layer's bias with an axis for steps, (M, 1, O)."""
    return params[f"mean.{layer}.bias"].unsqueeze(-2)


class MlpTangents:
    """One perceptron's activations on fixed inputs, kept; derivatives along parameter vectors."""

    def __init__(self, mlp: Mlp, params: Params, observations: Tensor) -> None:
        self.layers = len(mlp.sizes) - 1
        self.relu = mlp.nonlinearity == "relu"
        self.weights = [params[f"mean.{i}.weight"] for i in range(self.layers)]
        self.inputs = [observations]
        for i in range(self.layers - 1):
            z = times(self.inputs[-1], self.weights[i]).add_(bias(params, i))
            self.inputs.append(z.relu_() if self.relu else z.tanh_())
        last = self.layers - 1
        self.means = times(self.inputs[-1], self.weights[last]).add_(bias(params, last))
        # The nonlinearity's slope at each hidden unit.
        self.slopes = [
            (a > 0).to(a.dtype) if self.relu else 1.0 - a.square() for a in self.inputs[1:]
        ]

    def forward(self, vector: Params) -> tuple[Tensor, list[Tensor]]:
        """Return the derivative of the means and of every layer's input along `vector`."""
        tangents: list[Tensor] = []
        dz = self.means
        for i in range(self.layers):
            dz = times(self.inputs[i], vector[f"mean.{i}.weight"]).add_(bias(vector, i))
            if i > 0:
                add_times(dz, tangents[-1], self.weights[i])
            if i < self.layers - 1:
                tangents.append(dz.mul_(self.slopes[i]))
        return dz, tangents

    def backward(self, cotangent: Tensor) -> tuple[Params, list[Tensor]]:
        """Return J' cotangent over the parameters, and the cotangent of every layer's output."""
        gradient: Params = {}
        deltas = [cotangent]
        for i in reversed(range(self.layers)):
            delta = deltas[-1]
            gradient[f"mean.{i}.weight"] = times(self.inputs[i].mT, delta)
            gradient[f"mean.{i}.bias"] = delta.sum(-2)
            if i > 0:
                deltas.append(torch.bmm(delta, self.weights[i].mT).mul_(self.slopes[i - 1]))
        return gradient, deltas[::-1]


class MlpHessian:
    """The Hessian of one inner loss of a perceptron policy, times vectors, by the R-operator."""

    def __init__(self, mlp: Mlp, loss: InnerLoss, params: Params, steps: Steps) -> None:
        self._net = MlpTangents(mlp, params, steps.observations)
        # The head, from means and log std to the loss, is small: its graph is kept.
        means = self._net.means.detach().requires_grad_()
        raw = params[LOG_STD].detach().requires_grad_()
        log_probs = log_density(means, raw.clamp(min=MIN_LOG_STD), steps.actions)
        value = vmap(loss)(log_probs, steps).sum()
        self._head = (means, raw)
        self._slope = torch.autograd.grad(value, self._head, create_graph=True)
        _, self._deltas = self._net.backward(self._slope[0].detach())
        # tanh's slope 1 - a^2 changes by -2 a da, which multiplies the backward signal. relu's
        # slope does not change.
        net = self._net
        self._bends = (
            []
            if net.relu
            else [
                -2.0 * net.inputs[i] * torch.bmm(self._deltas[i], net.weights[i].mT)
                for i in range(1, net.layers)
            ]
        )

    def product(self, vector: Params) -> Params:
        """Return H v for each task; `vector` and result (M, ...) by name."""
        net = self._net
        dmeans, tangents = net.forward(vector)
        dslope, dlog_std = torch.autograd.grad(
            self._slope, self._head, (dmeans, vector[LOG_STD]), retain_graph=True
        )
        result: Params = {}
        ddelta = dslope
        for i in reversed(range(net.layers)):
            weight = times(net.inputs[i].mT, ddelta)
            if i > 0:
                add_times(weight, tangents[i - 1].mT, self._deltas[i])
            result[f"mean.{i}.weight"] = weight
            result[f"mean.{i}.bias"] = ddelta.sum(-2)
            if i > 0:
                back = torch.bmm(ddelta, net.weights[i].mT)
                back.baddbmm_(self._deltas[i], vector[f"mean.{i}.weight"].mT)
                ddelta = back.mul_(net.slopes[i - 1])
                if self._bends:
                    ddelta.addcmul_(self._bends[i - 1], tangents[i - 1])
        result[LOG_STD] = dlog_std
        return result


class MlpLinearisation:
    """By hand, for a policy whose mean is an MLP; exact for any inner loss."""

    def __init__(
        self, inner: InnerStep, points: Sequence[Params], batches: Sequence[Steps], outer: Steps
    ) -> None:
        """Linearise around the parameters before each inner step and after the last, `points`."""
        network = inner.policy.network
        if not isinstance(network, Mlp):
            raise TypeError("MlpLinearisation needs an Mlp; use GraphLinearisation")
        self._like = {name: p[0] for name, p in points[0].items()}
        self._alpha = inner.step_size
        # First-order MAML takes P = I, and so needs no Hessian.
        self._hessians = (
            []
            if inner.first_order
            else [
                MlpHessian(network, inner.loss, params, steps)
                for params, steps in zip(points[:-1], batches, strict=True)
            ]
        )
        self._net = MlpTangents(network, points[-1], outer.observations)
        raw = points[-1][LOG_STD]
        self._free = (raw >= MIN_LOG_STD).to(raw.dtype)
        self._precision = torch.exp(-2.0 * log_std(points[-1])).unsqueeze(-2)

    def _join(self, params: Params) -> Tensor:
        return flatten({name: params[name] for name in self._like}, axes=1)

    def _shrink(self, vectors: Tensor, hessian: MlpHessian) -> Tensor:
        image = self._join(hessian.product(unflatten(vectors, self._like)))
        return torch.sub(vectors, image, alpha=self._alpha)

    def push(self, vectors: Tensor) -> Tensor:
        """Return P v (M, d)."""
        for hessian in self._hessians:
            vectors = self._shrink(vectors, hessian)
        return vectors

    def pull(self, covectors: Tensor) -> Tensor:
        """Return P' w (M, d)."""
        for hessian in reversed(self._hessians):
            covectors = self._shrink(covectors, hessian)
        return covectors

    def fisher(self, vectors: Tensor, weights: Tensor) -> Tensor:
        """Return J' F J u (M, d)."""
        vector = unflatten(vectors, self._like)
        dmeans, _ = self._net.forward(vector)
        dmeans.mul_(weights.unsqueeze(-1) * self._precision)
        gradient, _ = self._net.backward(dmeans)
        gradient[LOG_STD] = 2.0 * weights.sum(-1, keepdim=True) * self._free * vector[LOG_STD]
        return self._join(gradient)


Linearise = Callable[[InnerStep, Sequence[Params], Sequence[Steps], Steps], Linearisation]
"""Makes the products of some tasks, as `linearise` does."""


def linearise(
    inner: InnerStep, points: Sequence[Params], batches: Sequence[Steps], outer: Steps
) -> Linearisation:
    """Linearise some tasks' meta-step: by hand for an MLP, through the graph for anything else.

    Args:
        inner: the inner step.
        points: parameters (M, ...) before each inner step, and after the last.
        batches: the steps (M, S, ...) that each inner step learned from.
        outer: the steps of the adapted policies.
    """
    if isinstance(inner.policy.network, Mlp):
        return MlpLinearisation(inner, points, batches, outer)
    return GraphLinearisation(inner, points[0], batches, outer)
