"""A Gaussian policy as functions of a parameter dict.

Its mean is a multilayer perceptron, or any `torch.nn.Module`; its standard deviation is one
parameter an action. Both are adapted. Actions are in the policy's unit, where 1 (or
`action_scale`) is the body's bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.func import vmap

from maml_rl.adapt import Params
from maml_rl.stateless import StatelessModule

MIN_LOG_STD = math.log(1e-6)
LOG_STD = "log_std"

NONLINEARITIES: Mapping[str, Callable[[Tensor], Tensor]] = {"relu": torch.relu, "tanh": torch.tanh}


@dataclass(frozen=True, kw_only=True)
class PolicySettings:
    """The policy network."""

    layers: tuple[int, ...] = (100, 100)
    """Width of each hidden layer."""
    nonlinearity: Literal["relu", "tanh"] = "relu"
    """After each hidden layer."""
    initial_log_std: float = 0.0
    """Logarithm of the action noise at the start, in the policy's unit."""
    action_scale: float = 1.0
    """The policy's action that is the body's bound. 10 explores a tenth as widely."""
    observe_task: bool = False
    """Whether the task's numbers are appended to the observation: an oracle's policy."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if len(self.layers) > 100:
            raise ValueError(f"policy.layers must be at most 100 layers, got {len(self.layers)}")
        if any(width < 1 for width in self.layers):
            raise ValueError(f"policy.layers must all be at least 1, got {self.layers}")
        if any(width > 100_000 for width in self.layers):
            raise ValueError(f"policy.layers must all be at most 100000, got {self.layers}")
        if not (math.isfinite(self.action_scale) and self.action_scale > 0):
            raise ValueError(f"policy.action_scale must be above 0, got {self.action_scale}")
        if self.action_scale > 1e6:
            raise ValueError(f"policy.action_scale must be at most 1e+06, got {self.action_scale}")
        if not MIN_LOG_STD <= self.initial_log_std <= 10:
            raise ValueError(
                f"policy.initial_log_std must be between {MIN_LOG_STD:.1f} and 10, "
                f"got {self.initial_log_std}"
            )


class Network(Protocol):
    """A mean: observations to actions, as a function of parameters."""

    def initial_parameters(self, generator: torch.Generator) -> Params:
        """Draw theta."""

    def __call__(self, params: Params, observations: Tensor) -> Tensor:
        """Map one task's observations (..., S, O) to means (..., S, A)."""

    def of_tasks(self, params: Params, observations: Tensor) -> Tensor:
        """Map M tasks' observations (M, S, O), with parameters (M, ...), to means (M, S, A)."""


@dataclass(frozen=True)
class Mlp:
    """Multilayer perceptron: weights (in, out) named `mean.L.weight`, biases `mean.L.bias`."""

    sizes: tuple[int, ...]
    """Observation size, hidden widths, action size."""
    nonlinearity: str = "relu"

    def initial_parameters(self, generator: torch.Generator) -> Params:
        """Draw weights Xavier-uniform, +-sqrt(6 / (in + out)), the output's too; biases 0."""
        params = {}
        for layer, (n_in, n_out) in enumerate(zip(self.sizes, self.sizes[1:], strict=False)):
            bound = math.sqrt(6.0 / (n_in + n_out))
            uniform = torch.rand(n_in, n_out, generator=generator)
            params[f"mean.{layer}.weight"] = (2.0 * uniform - 1.0) * bound
            params[f"mean.{layer}.bias"] = torch.zeros(n_out)
        return params

    def __call__(self, params: Params, observations: Tensor) -> Tensor:
        """Map observations (..., S, O) to means (..., S, A); a task axis leads both or neither."""
        activation = NONLINEARITIES[self.nonlinearity]
        last = len(self.sizes) - 2
        hidden = observations
        for layer in range(last + 1):
            weight, bias = params[f"mean.{layer}.weight"], params[f"mean.{layer}.bias"]
            hidden = torch.matmul(hidden, weight) + bias.unsqueeze(-2)
            if layer < last:
                hidden = activation(hidden)
        return hidden

    def of_tasks(self, params: Params, observations: Tensor) -> Tensor:
        """Map M tasks' observations (M, S, O) to means (M, S, A), one batched product a layer.

        A task's bits do not depend on how many tasks go through together.
        """
        return self(params, observations)


class ModuleNetwork:
    """Any module (O) -> (A) that works on a batch of rows, as a function of its parameters."""

    def __init__(self, module: nn.Module) -> None:
        self._function = StatelessModule(module)

    def initial_parameters(self, generator: torch.Generator) -> Params:
        """Return the module's own parameters; the generator is not used."""
        return {f"mean.{n}": p for n, p in self._function.parameters().items()}

    def __call__(self, params: Params, observations: Tensor) -> Tensor:
        """Map one task's observations (S, O) to means (S, A)."""
        own = {n.removeprefix("mean."): p for n, p in params.items() if n != LOG_STD}
        return self._function(own, observations)

    def of_tasks(self, params: Params, observations: Tensor) -> Tensor:
        """Map M tasks' observations (M, S, O) to means (M, S, A)."""
        return vmap(self)(params, observations)


@dataclass(frozen=True)
class GaussianPolicy:
    """pi(a | o) = N(mean(o), exp(log_std)^2), independent over action dimensions."""

    network: Network
    action_size: int
    initial_log_std: float = 0.0
    observes_task: bool = False
    """Whether the last columns of an observation are the task's numbers."""

    def initial_parameters(self, seed: int) -> Params:
        """Draw theta from a seed; on the CPU, float32."""
        params = self.network.initial_parameters(torch.Generator().manual_seed(seed))
        return params | {LOG_STD: torch.full((self.action_size,), self.initial_log_std)}

    def log_prob(self, params: Params, observations: Tensor, actions: Tensor) -> Tensor:
        """Return one task's log pi(a | o), (S,), from observations (S, O) and actions (S, A)."""
        return log_density(self.network(params, observations), log_std(params), actions)


def make_policy(
    settings: PolicySettings,
    observation_size: int,
    action_size: int,
    mean: nn.Module | None = None,
) -> GaussianPolicy:
    """Build a policy with an MLP mean, or with `mean`, a module (S, O) -> (S, A)."""
    network: Network = (
        Mlp((observation_size, *settings.layers, action_size), settings.nonlinearity)
        if mean is None
        else ModuleNetwork(mean)
    )
    return GaussianPolicy(network, action_size, settings.initial_log_std, settings.observe_task)


def log_std(params: Params) -> Tensor:
    """Return the log standard deviations (..., A), not below log 1e-6."""
    return params[LOG_STD].clamp(min=MIN_LOG_STD)


def noise_variance(params: Params) -> float:
    """Return the variance of the action noise, the geometric mean over actions; of one policy."""
    return float(torch.exp(2.0 * log_std(params).detach().double().mean()))


def log_density(means: Tensor, log_stds: Tensor, actions: Tensor) -> Tensor:
    """log N(a; mean, std^2), summed over action dimensions.

    Args:
        means: (..., S, A).
        log_stds: (..., A), clamped already.
        actions: (..., S, A).

    Returns:
        (..., S).
    """
    log_stds = log_stds.unsqueeze(-2)
    scaled = (actions - means) * torch.exp(-log_stds)
    constant = 0.5 * math.log(2.0 * math.pi)
    return (-0.5 * scaled.square() - log_stds - constant).sum(-1)


def kl_divergence(
    old_means: Tensor, old_log_stds: Tensor, means: Tensor, log_stds: Tensor
) -> Tensor:
    """KL(old || new) of diagonal Gaussians at every step.

    Sum over action dimensions of log(s/s_old) + (s_old^2 + (m_old - m)^2) / (2 s^2) - 1/2.

    Args:
        old_means: (..., S, A).
        old_log_stds: (..., A), clamped already.
        means: (..., S, A).
        log_stds: (..., A), clamped already.

    Returns:
        (..., S).
    """
    ratio = (old_log_stds - log_stds).unsqueeze(-2)
    scaled = (old_means - means) * torch.exp(-log_stds).unsqueeze(-2)
    return (0.5 * (torch.expm1(2.0 * ratio) + scaled.square()) - ratio).sum(-1)


def entropy(params: Params) -> Tensor:
    """Return the entropy of the action noise in nats, (...): sum of log_std + log(2 pi e) / 2."""
    return (log_std(params) + 0.5 * math.log(2.0 * math.pi * math.e)).sum(-1)
