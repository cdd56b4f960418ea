"""The Gaussian policy, against torch.distributions and torch.nn."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Independent, Normal

from maml_rl.adapt import Params, broadcast
from maml_rl.policy import (
    LOG_STD,
    MIN_LOG_STD,
    Mlp,
    ModuleNetwork,
    PolicySettings,
    entropy,
    kl_divergence,
    log_density,
    log_std,
    make_policy,
)

M, S, O, H1, H2, A = 3, 4, 5, 7, 6, 2  # noqa: E741  # the page's letter

ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh}


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=rng, dtype=torch.float64)


def gaussian(means: Tensor, log_stds: Tensor) -> Independent[Normal]:
    return Independent(Normal(means, torch.exp(log_stds).unsqueeze(-2).expand_as(means)), 1)


@pytest.mark.parametrize("tasks", [(), (M,)])
def test_log_density_is_that_of_independent_gaussians(tasks: tuple[int, ...]) -> None:
    """Sum over action dimensions, not their mean, with a task axis and without."""
    means, log_stds = draw(*tasks, S, A, seed=1), draw(*tasks, A, seed=2)
    actions = draw(*tasks, S, A, seed=3, scale=2.0)
    expected = gaussian(means, log_stds).log_prob(actions)  # type: ignore[no-untyped-call]
    assert expected.shape == (*tasks, S)
    torch.testing.assert_close(
        log_density(means, log_stds, actions), expected, rtol=1e-13, atol=1e-13
    )


@pytest.mark.parametrize("tasks", [(), (M,)])
def test_kl_is_from_the_old_policy_to_the_new(tasks: tuple[int, ...]) -> None:
    """KL(old || new), which is not KL(new || old)."""
    old, new = (
        (draw(*tasks, S, A, seed=seed), draw(*tasks, A, seed=seed + 1, scale=0.5))
        for seed in (4, 6)
    )
    expected = torch.distributions.kl_divergence(gaussian(*old), gaussian(*new))
    backward = torch.distributions.kl_divergence(gaussian(*new), gaussian(*old))
    assert expected.shape == (*tasks, S)
    torch.testing.assert_close(kl_divergence(*old, *new), expected, rtol=1e-12, atol=1e-12)
    assert (expected - backward).abs().max() > 0.1


def test_kl_of_a_policy_to_itself_is_exactly_0() -> None:
    means, log_stds = draw(M, S, A).float(), draw(M, A, seed=1).float()
    assert torch.equal(kl_divergence(means, log_stds, means, log_stds), torch.zeros(M, S))


def test_entropy_is_that_of_the_action_noise() -> None:
    """Sum over action dimensions of log_std + log(2 pi e) / 2, in nats."""
    log_stds = draw(M, A, seed=8)
    expected = Independent(Normal(torch.zeros(M, A), log_stds.exp()), 1).entropy()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(entropy({LOG_STD: log_stds}), expected)


def test_log_std_is_clamped_with_no_gradient_below() -> None:
    """max(log_std, log 1e-6): value and slope 0 below, identity above."""
    raw = torch.tensor([-20.0, -13.0, 2.0], dtype=torch.float64, requires_grad=True)
    clamped = log_std({LOG_STD: raw})
    torch.testing.assert_close(clamped.exp()[0].item(), 1e-6)
    assert clamped[1:].tolist() == [-13.0, 2.0]
    (slope,) = torch.autograd.grad((clamped * torch.tensor([3.0, 5.0, 7.0])).sum(), raw)
    assert slope.tolist() == [0.0, 5.0, 7.0]
    # Entropy goes by the noise that is drawn, not by the parameter.
    torch.testing.assert_close(
        entropy({LOG_STD: raw.detach()[:1]}).item(),
        MIN_LOG_STD + 0.5 * math.log(2 * math.pi * math.e),
    )


def sequential(params: Params, nonlinearity: str) -> nn.Sequential:
    """The same network in torch.nn, whose weights are (out, in)."""
    layers: list[nn.Module] = []
    count = len(params) // 2
    for i in range(count):
        weight, bias = params[f"mean.{i}.weight"], params[f"mean.{i}.bias"]
        linear = nn.Linear(weight.shape[0], weight.shape[1], dtype=weight.dtype)
        with torch.no_grad():
            linear.weight.copy_(weight.T)
            linear.bias.copy_(bias)
        layers += [linear] if i == count - 1 else [linear, ACTIVATIONS[nonlinearity]()]
    return nn.Sequential(*layers)


def random_mlp(nonlinearity: str, seed: int) -> tuple[Mlp, Params]:
    """An MLP whose biases are not 0."""
    mlp = Mlp((O, H1, H2, A), nonlinearity)
    params = mlp.initial_parameters(torch.Generator().manual_seed(seed))
    for i, (name, p) in enumerate(params.items()):
        params[name] = p.double() + draw(*p.shape, seed=seed + i, scale=0.3)
    return mlp, params


@pytest.mark.parametrize("nonlinearity", ["relu", "tanh"])
def test_the_mlp_is_the_network_that_torch_nn_makes(nonlinearity: str) -> None:
    """x -> W3' f(W2' f(W1' x + b1) + b2) + b3, linear at the end."""
    mlp, params = random_mlp(nonlinearity, seed=10)
    observations = draw(S, O, seed=11)
    with torch.no_grad():
        expected = sequential(params, nonlinearity)(observations)
    torch.testing.assert_close(mlp(params, observations), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("nonlinearity", ["relu", "tanh"])
def test_of_tasks_gives_each_task_its_own_network(nonlinearity: str) -> None:
    """Means of task i come from its parameters and its observations alone."""
    mlp, first = random_mlp(nonlinearity, seed=12)
    each = [first] + [random_mlp(nonlinearity, seed=s)[1] for s in (13, 14)]
    params = {name: torch.stack([p[name] for p in each]) for name in first}
    observations = draw(M, S, O, seed=15)
    together = mlp.of_tasks(params, observations)
    assert together.shape == (M, S, A)
    for i in range(M):
        torch.testing.assert_close(together[i], mlp(each[i], observations[i]))


@pytest.fixture
def torch_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("torch_threads")
@pytest.mark.parametrize(
    ("sizes", "rows", "nonlinearity"),
    [
        ((20, 100, 100, 6), 20, "tanh"),
        ((41, 100, 100, 8), 1, "relu"),
        ((20, 8, 6), 3, "relu"),
        ((2, 7, 3), 4, "tanh"),
    ],
)
def test_a_tasks_bits_do_not_depend_on_the_company_it_goes_in(
    sizes: tuple[int, ...], rows: int, nonlinearity: str
) -> None:
    """The same float32 bits from 1, 8 or 40 tasks at a time, and from 1 or 2 torch threads."""
    mlp, tasks = Mlp(sizes, nonlinearity), 40
    rng = torch.Generator().manual_seed(16)
    each = [mlp.initial_parameters(rng) for _ in range(tasks)]
    params = {name: torch.stack([p[name] for p in each]) for name in each[0]}
    observations = torch.randn(tasks, rows, sizes[0], generator=rng)
    torch.set_num_threads(1)
    expected = mlp.of_tasks(params, observations)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for size in (1, 8, 40):
            parts = [
                mlp.of_tasks(
                    {name: p[start : start + size] for name, p in params.items()},
                    observations[start : start + size],
                )
                for start in range(0, tasks, size)
            ]
            assert torch.equal(torch.cat(parts), expected), (threads, size)
    # Parameters that are theta itself, expanded, give the bits of copies of it.
    shared = broadcast(each[0], tasks)
    copies = {name: p.contiguous() for name, p in shared.items()}
    assert torch.equal(mlp.of_tasks(shared, observations), mlp.of_tasks(copies, observations))


def test_initial_parameters_are_xavier_uniform_with_the_output_too() -> None:
    """Weights uniform in +-sqrt(6 / (in + out)), variance bound^2 / 3; biases 0; log_std given."""
    settings = PolicySettings(layers=(60, 40), initial_log_std=-0.25)
    policy = make_policy(settings, 30, 20)
    theta = policy.initial_parameters(seed=17)
    sizes = (30, 60, 40, 20)
    expected = {f"mean.{i}.{part}" for i in range(3) for part in ("weight", "bias")}
    assert set(theta) == expected | {LOG_STD}
    for i in range(3):
        weight, bias = theta[f"mean.{i}.weight"], theta[f"mean.{i}.bias"]
        bound = math.sqrt(6 / (sizes[i] + sizes[i + 1]))
        assert weight.shape == (sizes[i], sizes[i + 1])
        assert 0.98 * bound < weight.max() <= bound
        assert -bound <= weight.min() < -0.98 * bound
        assert abs(weight.mean()) < 0.1 * bound
        assert math.isclose(weight.var(), bound**2 / 3, rel_tol=0.15)
        assert torch.equal(bias, torch.zeros(sizes[i + 1]))
    assert torch.equal(theta[LOG_STD], torch.full((20,), -0.25))
    assert all(p.dtype == torch.float32 for p in theta.values())


def test_the_seed_decides_the_initial_parameters() -> None:
    policy = make_policy(PolicySettings(layers=(H1,)), O, A)
    one, again, other = (policy.initial_parameters(seed) for seed in (1, 1, 2))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["mean.0.weight"], other["mean.0.weight"])


@pytest.mark.parametrize("nonlinearity", ["relu", "tanh"])
def test_a_module_as_the_mean_equals_the_mlp_with_its_weights(nonlinearity: str) -> None:
    """make_policy(mean=module) gives the means and log-probabilities of the MLP."""
    mlp, weights = random_mlp(nonlinearity, seed=18)
    module = sequential(weights, nonlinearity)
    policy = make_policy(PolicySettings(layers=(H1, H2)), O, A, mean=module)
    theta = policy.initial_parameters(seed=0)
    # The module's own parameters: a copy, so that nothing learned changes the module.
    assert [n for n in theta if n != LOG_STD] == [f"mean.{n}" for n, _ in module.named_parameters()]
    theta["mean.0.weight"] += 1.0
    assert torch.equal(module[0].get_parameter("weight"), weights["mean.0.weight"].T)
    theta["mean.0.weight"] -= 1.0

    each = [{name: p * factor for name, p in theta.items()} for factor in (1.0, 0.5, 2.0)]
    params = {name: torch.stack([p[name] for p in each]) for name in theta}
    observations, actions = draw(M, S, O, seed=19), draw(M, S, A, seed=20)
    network = policy.network
    assert isinstance(network, ModuleNetwork)
    together = network.of_tasks(params, observations)
    for i, factor in enumerate((1.0, 0.5, 2.0)):
        own = {name: p * factor for name, p in weights.items()} | {LOG_STD: each[i][LOG_STD]}
        torch.testing.assert_close(together[i], mlp(own, observations[i]))
        expected = log_density(mlp(own, observations[i]), own[LOG_STD], actions[i])
        torch.testing.assert_close(policy.log_prob(each[i], observations[i], actions[i]), expected)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layers": (3, 0)}, "policy.layers must all be at least 1, got \\(3, 0\\)"),
        ({"action_scale": 0.0}, "policy.action_scale must be above 0, got 0.0"),
        ({"action_scale": math.inf}, "policy.action_scale must be above 0, got inf"),
        ({"initial_log_std": -14.0}, "policy.initial_log_std must be between -13.8 and 10"),
        ({"initial_log_std": math.nan}, "policy.initial_log_std must be between -13.8 and 10"),
    ],
)
def test_settings_out_of_range_are_refused(fields: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PolicySettings(**fields)  # type: ignore[arg-type]  # wrong on purpose
