"""Advantages, against scalar loops and numpy's least squares; whatever a dead step holds is 99."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from maml_rl.advantages import (
    REGULARISATION,
    TRIES,
    AdvantageSettings,
    baseline_features,
    discounted_sums,
    estimate_advantages,
    explained_variance,
    fit_baseline,
    normalise,
)
from maml_rl.episodes import Episodes

M, E, H, O = 2, 7, 5, 3  # noqa: E741  # the page's letter
POISON = 99.0

LENGTHS = ((5, 2, 5, 1, 3, 4, 5), (3, 5, 5, 0, 2, 5, 4))
"""Some end early, some at the horizon; task 1's fourth slot holds no episode."""


def make_episodes(
    observations: Tensor, rewards: Tensor, lengths: tuple[tuple[int, ...], ...] = LENGTHS
) -> Episodes:
    """Episodes whose dead steps hold 99."""
    tasks, episodes, horizon = rewards.shape
    alive = torch.arange(horizon) < torch.tensor(lengths).unsqueeze(-1)
    return Episodes(
        observations=torch.where(alive.unsqueeze(-1), observations, POISON),
        actions=torch.full((tasks, episodes, horizon, 1), POISON),
        rewards=torch.where(alive, rewards, POISON),
        alive=alive,
        log_probs=torch.full((tasks, episodes, horizon), POISON),
        measures=torch.full((tasks, episodes, horizon, 1), POISON),
        diverged=torch.zeros(tasks, episodes, dtype=torch.bool),
    )


def random_episodes(seed: int) -> Episodes:
    """Observations wide enough for some to be clipped at +-10."""
    rng = torch.Generator().manual_seed(seed)
    return make_episodes(
        6.0 * torch.randn(M, E, H, O, generator=rng), torch.randn(M, E, H, generator=rng)
    )


def ridge(features: npt.NDArray[np.float64], returns: npt.NDArray[np.float64]) -> Tensor:
    """Least squares with sqrt(1e-5) I below the features and 0 below the returns."""
    D = features.shape[1]
    rows = np.vstack([features, math.sqrt(1e-5) * np.eye(D)])
    solution, *_ = np.linalg.lstsq(rows, np.concatenate([returns, np.zeros(D)]), rcond=None)
    return torch.from_numpy(solution)


def one_task(
    episodes: Episodes, task: int, gamma: float, lam: float
) -> tuple[list[list[float]], float]:
    """Advantages of a task's live steps, episode by episode, and the explained variance."""
    observations = episodes.observations[task].double().numpy()
    lengths = [int(row.sum()) for row in episodes.alive[task]]
    features, returns = [], []
    for e, length in enumerate(lengths):
        for t in range(length):
            o = [min(max(x, -10.0), 10.0) for x in observations[e, t]]
            time = t / 100
            features.append([*o, *(x * x for x in o), time, time**2, time**3, 1.0])
            returns.append(
                sum(gamma**k * float(episodes.rewards[task, e, t + k]) for k in range(length - t))
            )
    rows = np.array(features)
    values = rows @ ridge(rows, np.array(returns)).numpy()
    raw: list[list[float]] = []
    start = 0
    for e, length in enumerate(lengths):
        V = [*values[start : start + length], 0.0]
        delta = [
            float(episodes.rewards[task, e, t]) + gamma * V[t + 1] - V[t] for t in range(length)
        ]
        raw.append(
            [
                sum((gamma * lam) ** k * delta[t + k] for k in range(length - t))
                for t in range(length)
            ]
        )
        start += length
    flat = np.array([a for row in raw for a in row])
    scaled = [[(a - flat.mean()) / (flat.std() + 1e-8) for a in row] for row in raw]
    return scaled, 1.0 - float(np.var(np.array(returns) - values) / np.var(returns))


def test_discounted_sums_by_hand() -> None:
    """y_t = x_t + factor y_t+1: with 1/2, (1, 2, 3) gives (2.75, 3.5, 3)."""
    values = torch.tensor([[1.0, 2.0, 3.0], [4.0, 0.0, -2.0]])
    assert discounted_sums(values, 0.5).tolist() == [[2.75, 3.5, 3.0], [3.5, -1.0, -2.0]]
    assert discounted_sums(values, 1.0).tolist() == [[6.0, 5.0, 3.0], [2.0, -2.0, -2.0]]
    assert torch.equal(discounted_sums(values, 0.0), values)


@pytest.mark.parametrize(("gamma", "lam"), [(0.95, 1.0), (0.95, 0.9), (0.5, 0.0), (1.0, 0.3)])
def test_advantages_are_those_of_scalar_loops(gamma: float, lam: float) -> None:
    """A_t = sum_k (gamma lambda)^k delta_t+k with delta_t = r_t + gamma V_t+1 - V_t and V after the
    last step 0, whether the episode ends early or at the horizon; then (A - mean) / std."""
    episodes = random_episodes(seed=1)
    settings = AdvantageSettings(discount=gamma, gae_lambda=lam)
    advantages, explained = estimate_advantages(episodes, settings)
    assert advantages.shape == (M, E, H)
    assert advantages.dtype == torch.float32
    for task in range(M):
        expected, fit = one_task(episodes, task, gamma, lam)
        for e, row in enumerate(expected):
            torch.testing.assert_close(
                advantages[task, e, : len(row)].double(),
                torch.tensor(row, dtype=torch.float64),
                rtol=1e-5,
                atol=1e-6,
            )
            assert not advantages[task, e, len(row) :].any()
        assert math.isclose(float(explained[task]), fit, rel_tol=1e-6)


def test_with_lambda_1_advantages_are_returns_less_values() -> None:
    """sum_k gamma^k delta_t+k telescopes to R_t - V_t, before both are normalised."""
    episodes = random_episodes(seed=2)
    alive = episodes.alive
    returns = discounted_sums(torch.where(alive, episodes.rewards, 0.0).double(), 0.9)
    features = baseline_features(episodes.observations, alive)
    weights = fit_baseline(features.reshape(M, E * H, -1), returns.reshape(M, E * H))
    values = torch.einsum("mehd,md->meh", features, weights)
    advantages, _ = estimate_advantages(episodes, AdvantageSettings(discount=0.9))
    torch.testing.assert_close(advantages, normalise(returns - values, alive).float())


def test_a_value_function_in_the_span_leaves_no_advantage() -> None:
    """R = 3 o_0 - 2 o_1^2 + 5 (t/100) - 0.5 makes R - V vanish but for the ridge's 1e-5.

    Rewards are r_t = R_t - gamma R_t+1, and the last reward of an episode is R itself.
    """
    rng = torch.Generator().manual_seed(3)
    observations = torch.randn(M, E, H, O, generator=rng)
    time = torch.arange(H) / 100
    wanted = 3 * observations[..., 0] - 2 * observations[..., 1] ** 2 + 5 * time - 0.5
    alive = torch.arange(H) < torch.tensor(LENGTHS).unsqueeze(-1)
    wanted = torch.where(alive, wanted, 0.0)
    later = torch.cat([wanted[..., 1:], torch.zeros(M, E, 1)], -1)
    episodes = make_episodes(observations, wanted - 0.9 * later)

    features = baseline_features(episodes.observations, alive).reshape(M, E * H, -1)
    returns = discounted_sums(torch.where(alive, episodes.rewards, 0.0).double(), 0.9)
    torch.testing.assert_close(returns, wanted.double(), rtol=1e-5, atol=1e-5)
    values = (features @ fit_baseline(features, returns.reshape(M, -1)).unsqueeze(-1)).flatten(1)
    assert (returns.flatten(1) - values).abs().max() < 1e-3
    assert returns.abs().max() > 3
    _, explained = estimate_advantages(episodes, AdvantageSettings(discount=0.9))
    assert (explained > 1 - 1e-7).all()


def test_features_by_hand() -> None:
    """[o, o^2, t/100, (t/100)^2, (t/100)^3, 1] with o clipped to +-10, and 0 on dead steps."""
    observations = torch.tensor([[[[1.0, 2.0], [-30.0, 0.5], [99.0, 99.0]]]])
    alive = torch.tensor([[[True, True, False]]])
    features = baseline_features(observations, alive)
    assert features.dtype == torch.float64
    expected = [
        [1.0, 2.0, 1.0, 4.0, 0.0, 0.0, 0.0, 1.0],
        [-10.0, 0.5, 100.0, 0.25, 1e-2, 1e-4, 1e-6, 1.0],
        [0.0] * 8,
    ]
    torch.testing.assert_close(features[0, 0], torch.tensor(expected, dtype=torch.float64))


def test_the_fit_is_each_tasks_own_ridge_regression() -> None:
    """w = argmin |F w - R|^2 + 1e-5 |w|^2, by numpy's lstsq in float64, a task at a time."""
    rng = np.random.default_rng(4)
    features, returns = rng.standard_normal((3, 11, 4)), rng.standard_normal((3, 11))
    weights = fit_baseline(torch.from_numpy(features), torch.from_numpy(returns))
    assert weights.shape == (3, 4)
    for task in range(3):
        expected = ridge(features[task], returns[task])
        torch.testing.assert_close(weights[task], expected, rtol=1e-11, atol=1e-12)


def test_collinear_features_are_solved() -> None:
    """Columns that repeat each other to 1e-6, as the ant's rotation does: |F w - R| is lstsq's."""
    rng = np.random.default_rng(5)
    one, other = rng.standard_normal((2, 40, 1))
    noise = 1e-6 * rng.standard_normal((40, 4))
    features = np.hstack([one, other, one + other, one - 2 * other, 3 * one, np.ones((40, 1))])
    features[:, 2:] += noise
    returns = 2 * one[:, 0] - other[:, 0] + 0.1 * rng.standard_normal(40)
    assert np.linalg.cond(features) > 1e6
    weights = fit_baseline(torch.from_numpy(features)[None], torch.from_numpy(returns)[None])
    expected = features @ ridge(features, returns).numpy()
    np.testing.assert_allclose(features @ weights[0].numpy(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("poison", [POISON, -1e30, math.nan, math.inf])
def test_what_dead_steps_hold_changes_no_bit(poison: float) -> None:
    """Dead entries of 0 and of anything else give the same advantages and fit, bit for bit."""
    episodes = random_episodes(seed=6)
    alive = episodes.alive

    def dead(value: float) -> Episodes:
        return replace(
            episodes,
            observations=torch.where(alive.unsqueeze(-1), episodes.observations, value),
            rewards=torch.where(alive, episodes.rewards, value),
        )

    settings = AdvantageSettings(discount=0.9, gae_lambda=0.8)
    for one, other in zip(
        estimate_advantages(dead(0.0), settings),
        estimate_advantages(dead(poison), settings),
        strict=True,
    ):
        assert torch.equal(one, other)


def test_the_end_of_an_episode_is_the_same_early_and_at_the_horizon() -> None:
    """V after the last step is 0: three steps under H = 3 are worth what they are under H = 5."""
    rng = torch.Generator().manual_seed(7)
    observations = torch.randn(1, E, 3, O, generator=rng)
    rewards = torch.randn(1, E, 3, generator=rng)
    settings = AdvantageSettings(discount=0.9, gae_lambda=0.5)
    lengths = ((3,) * E,)
    at_horizon, _ = estimate_advantages(make_episodes(observations, rewards, lengths), settings)
    longer = torch.nn.functional.pad(rewards, (0, 2))
    early, _ = estimate_advantages(
        make_episodes(torch.nn.functional.pad(observations, (0, 0, 0, 2)), longer, lengths),
        settings,
    )
    torch.testing.assert_close(early[..., :3], at_horizon, rtol=1e-5, atol=1e-6)


def test_each_tasks_advantages_have_mean_0_and_standard_deviation_1() -> None:
    """Over live steps of each task (divisor n), though the tasks' rewards differ a thousandfold."""
    episodes = random_episodes(seed=8)
    scale = torch.tensor([1.0, 1000.0])[:, None, None]
    episodes = replace(episodes, rewards=episodes.rewards * scale)
    advantages, _ = estimate_advantages(episodes, AdvantageSettings())
    for task in range(M):
        live = advantages[task][episodes.alive[task]].double()
        assert abs(live.mean()) < 1e-6
        assert math.isclose(live.std(correction=0), 1.0, abs_tol=1e-6)


def test_flat_advantages_stay_finite() -> None:
    """Where all advantages are equal, (A - mean) / (0 + 1e-8) is 0."""
    values, alive = torch.full((1, 2, 3), 5.0).double(), torch.ones(1, 2, 3, dtype=torch.bool)
    assert torch.equal(normalise(values, alive), torch.zeros(1, 2, 3, dtype=torch.float64))


def test_regularisation_grows_where_the_matrix_stays_singular() -> None:
    """Gram matrix 2^37 in all entries: adding 1e-5 rounds away (half an ulp is 1.5e-5), 1e-4 does
    not. 2^59 swallows all five, and NaN is never solved: those tasks' baseline is 0. A task that
    is solved at once keeps the solution of 1e-5, bit for bit."""
    rng = torch.Generator().manual_seed(9)
    features = torch.stack(
        [
            torch.randn(2, 2, generator=rng, dtype=torch.float64),
            torch.full((2, 2), 2.0**18, dtype=torch.float64),
            torch.full((2, 2), 2.0**29, dtype=torch.float64),
            torch.full((2, 2), math.nan, dtype=torch.float64),
        ]
    )
    returns = torch.tensor([[1.0, 2.0], [3.0, 3.0], [3.0, 3.0], [4.0, 4.0]], dtype=torch.float64)
    weights = fit_baseline(features, returns)
    torch.testing.assert_close(weights[0], ridge(features[0].numpy(), returns[0].numpy()))
    assert torch.equal(weights[0], fit_baseline(features[:1], returns[:1])[0])
    assert torch.isfinite(weights).all()
    torch.testing.assert_close(features[1] @ weights[1], returns[1], rtol=0.1, atol=0.0)
    assert not weights[2:].any()


def test_regularisation_is_multiplied_by_10_up_to_five_times(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """1e-5, 1e-4, ... 1e-1 are tried; a task that fails n times has the n + 1st's solution."""
    rng = np.random.default_rng(10)
    features = torch.from_numpy(rng.standard_normal((3, 9, 4)))
    returns = torch.from_numpy(rng.standard_normal((3, 9)))
    gram = features.mT @ features
    solve = torch.linalg.solve_ex
    tried: list[float] = []
    fails_until = torch.tensor([0, 2, 99])

    def solve_ex(matrix: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        solution, _ = solve(matrix, right)
        tried.append(float((matrix - gram)[0, 0, 0]))
        return solution, (fails_until >= len(tried)).int()

    monkeypatch.setattr(torch.linalg, "solve_ex", solve_ex)
    weights = fit_baseline(features, returns)
    assert TRIES == len(tried) == 5
    np.testing.assert_allclose(tried, [REGULARISATION * 10**k for k in range(5)], rtol=1e-6)
    for task, regularisation in ((0, 1e-5), (1, 1e-3)):
        system = gram[task].numpy() + regularisation * np.eye(4)
        expected = np.linalg.solve(system, (features[task].T @ returns[task]).numpy())
        np.testing.assert_allclose(weights[task].numpy(), expected, rtol=1e-12)
    assert not weights[2].any()


def test_without_a_solution_the_baseline_is_0(monkeypatch: pytest.MonkeyPatch) -> None:
    """Advantages are then the normalised returns, and nothing of them is explained."""

    def never(matrix: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        return torch.full_like(right, math.nan), torch.ones(len(matrix), dtype=torch.int32)

    monkeypatch.setattr(torch.linalg, "solve_ex", never)
    episodes = random_episodes(seed=11)
    advantages, explained = estimate_advantages(episodes, AdvantageSettings(discount=0.9))
    returns = discounted_sums(torch.where(episodes.alive, episodes.rewards, 0.0).double(), 0.9)
    torch.testing.assert_close(advantages, normalise(returns, episodes.alive).float())
    assert explained.tolist() == [0.0] * M


def test_explained_variance_by_hand() -> None:
    """Returns 1 2 3 4 (variance 1.25). Values 1 2 3 2 leave 0 0 0 2, of variance 0.75: 1 - 0.6.
    Values -R leave 2 R, of variance 4 times: 1 - 4. Flat returns: 0."""
    alive = torch.tensor([[[True, True, False], [True, True, False]]]).expand(3, 2, 3)
    returns = torch.tensor([[[1.0, 2.0, 99.0], [3.0, 4.0, 99.0]]]).repeat(3, 1, 1)
    values = returns.clone()
    values[0, 1, 1] = 2.0
    values[1] = -returns[1]
    returns[2] = 7.0
    values[:, :, 2] = -99.0
    torch.testing.assert_close(
        explained_variance(values, returns, alive), torch.tensor([0.4, -3.0, 0.0])
    )


@pytest.mark.parametrize("name", ["discount", "gae_lambda"])
@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan])
def test_settings_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"advantages.{name} must be between 0 and 1, got {value}"):
        AdvantageSettings(**{name: value})
