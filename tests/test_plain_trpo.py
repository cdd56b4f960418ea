"""With no inner step the outer update is plain TRPO: against Stable-Baselines3's, on one batch."""

from __future__ import annotations

import math
from collections.abc import Callable

import gymnasium
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from maml_rl.adapt import Params, broadcast, flatten
from maml_rl.chunks import Chunks
from maml_rl.curvature import InnerStep
from maml_rl.episodes import Steps
from maml_rl.losses import INNER_LOSSES
from maml_rl.maml import MetaObjective
from maml_rl.policy import LOG_STD, PolicySettings, log_density, log_std, make_policy
from maml_rl.trust_region import (
    TrustRegionSettings,
    conjugate_gradient,
    trust_region_step,
)

trpo = pytest.importorskip("sb3_contrib.trpo.trpo", reason="sb3-contrib is not installed")

M, S, O, A = 3, 50, 4, 2  # noqa: E741  # the paper's letters
HIDDEN = (9, 7)
# Few iterations, since theirs are in float32 and ours in float64, and the error grows with them.
SETTINGS = TrustRegionSettings(max_kl=0.02, damping=0.01, cg_iterations=4)


class Plane(gymnasium.Env[np.ndarray, np.ndarray]):
    """Spaces of the right sizes; no step is taken in it."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (O,), np.float32)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (A,), np.float32)


def batch(theta: Params) -> Steps:
    """Steps of M tasks by the policy itself, with advantages that are just numbers."""
    rng = torch.Generator().manual_seed(3)
    observations = torch.randn(M, S, O, generator=rng)
    policy = make_policy(PolicySettings(layers=HIDDEN, nonlinearity="tanh"), O, A)
    with torch.no_grad():
        means = policy.network(broadcast(theta, M), observations)
        stds = log_std(broadcast(theta, M))
        actions = means + torch.exp(stds).unsqueeze(1) * torch.randn(M, S, A, generator=rng)
        log_probs = log_density(means, stds, actions)
    return Steps(
        observations=observations,
        actions=actions,
        advantages=torch.randn(M, S, generator=rng) + actions[..., 0] - observations[..., 1],
        log_probs=log_probs,
        weights=torch.full((M, S), 1 / S),
        first=torch.zeros(M, S, dtype=torch.int64),
    )


def their_names() -> dict[str, str]:
    """Our parameters' names, each with Stable-Baselines3's."""
    names = {LOG_STD: "log_std"}
    for layer, module in enumerate(
        ("mlp_extractor.policy_net.0", "mlp_extractor.policy_net.2", "action_net")
    ):
        for kind in ("weight", "bias"):
            names[f"mean.{layer}.{kind}"] = f"{module}.{kind}"
    return names


def test_search_direction_and_step_are_those_of_an_independent_trpo(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Same parameters, observations, actions and advantages, as many conjugate gradient iterations.

    Theirs takes the mean of the KL over action dimensions, where the KL is their sum: so bound and
    damping are divided by A, and its direction is A times ours. It starts conjugate gradient from
    small noise, here from 0 as ours. Its weights are (out, in), ours (in, out).
    """
    policy = make_policy(PolicySettings(layers=HIDDEN, nonlinearity="tanh"), O, A)
    theta = policy.initial_parameters(1) | {LOG_STD: torch.tensor([-0.3, 0.2])}
    steps = batch(theta)

    # Ours: no inner step.
    inner = InnerStep(policy, INNER_LOSSES["log-prob"], 0.1, False)
    with Chunks(1, 1) as chunks:
        objective = MetaObjective(inner, [broadcast(theta, M)], [], steps, chunks)
        flat = flatten(theta)

        def damped(vector: Tensor) -> Tensor:
            return objective.product(vector.float()).double() + SETTINGS.damping * vector

        gradient = objective.gradient().double()
        direction, _, _ = conjugate_gradient(damped, -gradient, SETTINGS.cg_iterations)
        ours, report = trust_region_step(objective, flat, SETTINGS)
    assert report.accepted

    # Theirs.
    model = trpo.TRPO(
        "MlpPolicy",
        Plane(),
        n_steps=M * S,
        batch_size=M * S,
        target_kl=SETTINGS.max_kl / A,
        cg_max_steps=SETTINGS.cg_iterations,
        cg_damping=SETTINGS.damping / A,
        line_search_shrinking_factor=SETTINGS.backtrack_ratio,
        line_search_max_iter=SETTINGS.backtracks,
        normalize_advantage=False,
        policy_kwargs={"net_arch": {"pi": list(HIDDEN), "vf": [3]}, "activation_fn": nn.Tanh},
        seed=0,
        device="cpu",
    )
    parameters = dict(model.policy.named_parameters())
    names = their_names()
    with torch.no_grad():
        for ours_name, theirs_name in names.items():
            value = theta[ours_name]
            parameters[theirs_name].copy_(value.T if value.ndim == 2 else value)
    buffer = model.rollout_buffer
    for i in range(M * S):
        buffer.add(
            steps.observations.reshape(-1, 1, O)[i].numpy(),
            steps.actions.reshape(-1, 1, A)[i].numpy(),
            np.zeros(1),
            np.zeros(1),
            torch.zeros(1),
            steps.log_probs.reshape(-1, 1)[i],
        )
    buffer.advantages[:] = steps.advantages.reshape(-1, 1).numpy()
    found = []
    solver: Callable[..., Tensor] = trpo.conjugate_gradient_solver

    def kept(*arguments: object, **named: object) -> Tensor:
        found.append(solver(*arguments, **named))
        return found[-1]

    monkeypatch.setattr(trpo, "conjugate_gradient_solver", kept)
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    model.set_logger(trpo_logger())
    model.train()

    def in_our_order(values: dict[str, Tensor]) -> Tensor:
        """Flatten values by their names and shapes into a vector like ours."""
        return flatten(
            {n: values[names[n]].T if theta[n].ndim == 2 else values[names[n]] for n in theta}
        )

    # Their order: that of named_parameters, without the value function's.
    order = [name for name in parameters if name in names.values()]
    parts = torch.split(found[0] / A, [parameters[name].numel() for name in order])
    theirs = {
        name: part.reshape(parameters[name].shape) for name, part in zip(order, parts, strict=True)
    }
    after = {name: parameters[name].detach() for name in order}
    reference = in_our_order(theirs)
    assert float((direction - reference).norm() / reference.norm()) < 1e-5
    step, other = ours - flat, in_our_order(after) - flat
    assert float((step - other).norm() / step.norm()) < 1e-5
    # Theirs measures KL(new || old), ours KL(old || new).
    theirs_kl = A * model.logger.name_to_value["train/kl_divergence_loss"]
    assert math.isclose(report.kl, theirs_kl, rel_tol=0.1)


def trpo_logger() -> object:
    """A logger that keeps values and prints nothing."""
    from stable_baselines3.common.logger import Logger

    return Logger(folder=None, output_formats=[])
