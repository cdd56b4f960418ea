"""The inner losses: one gradient, three Hessians, each against its formula written out."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.func import jacrev, vmap

from maml_rl.episodes import Steps
from maml_rl.losses import (
    INNER_LOSSES,
    InnerLoss,
    dice_loss,
    likelihood_ratio_loss,
    log_prob_loss,
)

# Three episodes of 2, 1 and 3 steps, and two steps of padding that hold 99 and weigh nothing.
LENGTHS = (2, 1, 3)
FIRST = (0, 0, 2, 3, 3, 3, 0, 0)
LIVE, S = 6, 8

THETA = torch.tensor([0.4, -0.7, 0.9, -0.3], dtype=torch.float64)


def log_probs(theta: Tensor, steps: Steps) -> Tensor:
    """log N(a; theta_2 tanh(theta_0 o_0 + theta_1 o_1), exp(theta_3)^2), curved in all four."""
    mean = theta[2] * torch.tanh(steps.observations @ theta[:2])
    scaled = (steps.actions[:, 0] - mean) / torch.exp(theta[3])
    return -0.5 * scaled.square() - theta[3] - 0.5 * math.log(2 * math.pi)


def hessian(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The Hessian by reverse mode twice, which is the mode that training uses."""
    twice: Callable[[Tensor], Tensor] = jacrev(jacrev(function))
    return twice


def poisoned(values: Tensor) -> Tensor:
    """The live rows, then padding that holds 99."""
    return torch.cat([values, values.new_full((S - LIVE, *values.shape[1:]), 99.0)])


def make_steps(seed: int) -> Steps:
    """One task's steps, sampled at THETA."""
    rng = torch.Generator().manual_seed(seed)
    steps = Steps(
        observations=poisoned(torch.randn(LIVE, 2, generator=rng, dtype=torch.float64)),
        actions=poisoned(torch.randn(LIVE, 1, generator=rng, dtype=torch.float64)),
        advantages=poisoned(torch.randn(LIVE, generator=rng, dtype=torch.float64)),
        log_probs=poisoned(torch.zeros(LIVE, dtype=torch.float64)),
        weights=torch.tensor([1 / LIVE] * LIVE + [0.0] * (S - LIVE), dtype=torch.float64),
        first=torch.tensor(FIRST),
    )
    return steps._replace(log_probs=poisoned(log_probs(THETA, steps)[:LIVE]))


def steps_of(log_probs: Tensor, advantages: list[float], first: list[int]) -> Steps:
    """As many live steps as advantages, with the log-probabilities at sampling."""
    live = len(advantages)
    return Steps(
        observations=torch.full((live, 1), 99.0),
        actions=torch.full((live, 1), 99.0),
        advantages=torch.tensor(advantages),
        log_probs=log_probs,
        weights=torch.full((live,), 1 / live),
        first=torch.tensor(first),
    )


def test_values_by_hand() -> None:
    """Advantages 1, -2, 5 and log-probabilities log 2, log 3, 0, sampled at 0, 0, log 4.

    log-prob: -(log 2 - 2 log 3 + 0) / 3. likelihood-ratio: -(2 - 6 + 5/4) / 3. dice: 0, being
    made for its derivatives.
    """
    now = torch.tensor([math.log(2), math.log(3), 0.0])
    steps = steps_of(torch.tensor([0.0, 0.0, math.log(4)]), [1.0, -2.0, 5.0], [0, 0, 2])
    expected = -(math.log(2) - 2 * math.log(3)) / 3
    torch.testing.assert_close(log_prob_loss(now, steps).item(), expected)
    torch.testing.assert_close(likelihood_ratio_loss(now, steps).item(), -(2 - 6 + 1.25) / 3)
    assert dice_loss(now, steps).item() == 0.0


def test_slopes_in_the_log_probabilities_by_hand() -> None:
    """dL/d log pi_t: -w A, -w A ratio, -w A; the likelihood ratio alone knows where it was sampled.

    Ratios are 2, 3 and 1/4, weights 1/3.
    """
    now = torch.tensor([math.log(2), math.log(3), 0.0])
    steps = steps_of(torch.tensor([0.0, 0.0, math.log(4)]), [1.0, -2.0, 5.0], [0, 0, 2])
    for loss, expected in (
        (log_prob_loss, [-1 / 3, 2 / 3, -5 / 3]),
        (likelihood_ratio_loss, [-2 / 3, 2.0, -5 / 12]),
        (dice_loss, [-1 / 3, 2 / 3, -5 / 3]),
    ):
        slope = jacrev(lambda lp, loss=loss: loss(lp, steps))(now)
        torch.testing.assert_close(slope, torch.tensor(expected))


def test_dice_couples_the_steps_of_an_episode_and_no_others() -> None:
    """d^2 L / d lp_s d lp_t = -w A_max(s,t) within an episode, 0 across episodes.

    exp(S_t) - exp(S_t-1) has second derivative 1 for s, s' <= t less 1 for s, s' <= t-1.
    """
    steps = steps_of(torch.zeros(3), [1.0, -2.0, 5.0], [0, 0, 2])
    curvature = hessian(lambda lp: dice_loss(lp, steps))(torch.tensor([0.3, -0.4, 0.5]))
    expected = -torch.tensor([[1.0, -2.0, 0.0], [-2.0, -2.0, 0.0], [0.0, 0.0, 5.0]]) / 3
    torch.testing.assert_close(curvature, expected)


@pytest.mark.parametrize("name", INNER_LOSSES)
def test_all_have_the_policy_gradient_where_they_were_sampled(name: str) -> None:
    """dL/d theta = -mean over live steps of A grad log pi, at the point of sampling."""
    steps = make_steps(seed=1)
    gradients = jacrev(lambda theta: log_probs(theta, steps))(THETA)
    expected = torch.zeros(4, dtype=torch.float64)
    for t in range(LIVE):
        expected -= steps.advantages[t] * gradients[t] / LIVE
    gradient = jacrev(lambda theta: INNER_LOSSES[name](log_probs(theta, steps), steps))(THETA)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-14)
    # By plain autograd too, which is what training differentiates with.
    leaf = THETA.clone().requires_grad_()
    (plain,) = torch.autograd.grad(INNER_LOSSES[name](log_probs(leaf, steps), steps), leaf)
    torch.testing.assert_close(plain, expected, rtol=1e-12, atol=1e-14)


def expected_hessian(name: str, steps: Steps) -> Tensor:
    """Each loss's Hessian at the point of sampling, summed step by step.

    With g_t, h_t the gradient and Hessian of log pi_t and G_t-1 the sum of g over the earlier
    steps of the same episode, it is -mean A_t times

    log-prob          h_t
    likelihood-ratio  h_t + g_t g_t'
    dice              h_t + g_t g_t' + g_t G_t-1' + G_t-1 g_t'
    """
    g = jacrev(lambda theta: log_probs(theta, steps))(THETA)
    h = hessian(lambda theta: log_probs(theta, steps))(THETA)
    total = torch.zeros(4, 4, dtype=torch.float64)
    t = 0
    for length in LENGTHS:
        earlier = torch.zeros(4, dtype=torch.float64)
        for _ in range(length):
            terms = {
                "log-prob": h[t],
                "likelihood-ratio": h[t] + torch.outer(g[t], g[t]),
                "dice": h[t]
                + torch.outer(g[t], g[t])
                + torch.outer(g[t], earlier)
                + torch.outer(earlier, g[t]),
            }
            total -= steps.advantages[t] * terms[name] / LIVE
            earlier = earlier + g[t]
            t += 1
    assert t == LIVE
    return total


@pytest.mark.parametrize("name", INNER_LOSSES)
def test_each_has_its_own_hessian(name: str) -> None:
    """See `expected_hessian`; by torch.func, and by differentiating autograd's gradient."""
    steps = make_steps(seed=2)
    expected = expected_hessian(name, steps)

    def value(theta: Tensor) -> Tensor:
        return INNER_LOSSES[name](log_probs(theta, steps), steps)

    torch.testing.assert_close(hessian(value)(THETA), expected, rtol=1e-11, atol=1e-13)
    leaf = THETA.clone().requires_grad_()
    (slope,) = torch.autograd.grad(value(leaf), leaf, create_graph=True)
    plain = torch.stack([torch.autograd.grad(s, leaf, retain_graph=True)[0] for s in slope])
    torch.testing.assert_close(plain, expected, rtol=1e-11, atol=1e-13)
    # No other loss would pass.
    for other in INNER_LOSSES:
        if other != name:
            assert (expected_hessian(other, steps) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("loss", INNER_LOSSES.values())
def test_lifted_over_tasks_each_has_its_own_steps(loss: InnerLoss) -> None:
    """vmap over tasks whose episodes have different lengths is the loss of each alone."""
    one, other = make_steps(seed=3), make_steps(seed=4)
    other = other._replace(first=torch.tensor([0, 1, 1, 1, 4, 4, 0, 0]))
    both = Steps(*(torch.stack(pair) for pair in zip(one, other, strict=True)))
    theta = torch.stack([THETA, THETA + 0.1])

    def curvature(theta: Tensor, steps: Steps) -> Tensor:
        return hessian(lambda t: loss(log_probs(t, steps), steps))(theta)

    together = vmap(curvature)(theta, both)
    torch.testing.assert_close(together[0], curvature(theta[0], one))
    torch.testing.assert_close(together[1], curvature(theta[1], other))
