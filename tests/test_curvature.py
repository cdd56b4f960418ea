"""Products with the trust region's matrix, against the whole Hessian of the KL itself.

Everything is float64 and tiny; three tasks with different numbers of live steps, padding of 99.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import hessian, jacrev

import maml_rl.policy
from maml_rl.adapt import Params, adapt, broadcast, flatten, unflatten
from maml_rl.chunks import Chunks
from maml_rl.curvature import (
    GraphLinearisation,
    InnerStep,
    Linearisation,
    Linearise,
    MlpLinearisation,
    linearise,
)
from maml_rl.episodes import Steps
from maml_rl.losses import INNER_LOSSES
from maml_rl.maml import MetaObjective, metric_tasks
from maml_rl.policy import (
    LOG_STD,
    GaussianPolicy,
    ModuleNetwork,
    PolicySettings,
    make_policy,
)

# torch.func.hessian differentiates forward, and torch itself warns of what it loads for that.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated"),
    pytest.mark.usefixtures("one_torch_thread"),
]


M, O, A, ALPHA = 3, 3, 2, 0.07  # noqa: E741  # the page's letter
LIVE = (5, 7, 4)
"""Live steps of each task."""
EPISODE = 3
"""Steps of an episode, but for a task's last one."""
POISON = 99.0

NARROW, WIDE = (4,), (17, 5)
"""Hidden widths: all below curvature.NARROW, and one above."""


def graph(
    inner: InnerStep, points: Sequence[Params], batches: Sequence[Steps], outer: Steps
) -> Linearisation:
    """Linearise through the graph, whatever the policy."""
    return GraphLinearisation(inner, points[0], batches, outer)


def by_hand(
    inner: InnerStep, points: Sequence[Params], batches: Sequence[Steps], outer: Steps
) -> Linearisation:
    """Linearise by hand, or fail."""
    return MlpLinearisation(inner, points, batches, outer)


WAYS = {"graph": graph, "by hand": by_hand}


@dataclass(frozen=True)
class Problem:
    """Three tasks around one theta."""

    inner: InnerStep
    theta: Params
    batches: list[Steps]
    """Of each inner step."""
    outer: Steps

    def adapted(self, theta: Params, *, tasks: int = M) -> Params:
        """theta' of every task, through `adapt` alone."""

        def loss(params: Params, steps: Steps) -> Tensor:
            log_probs = self.inner.policy.log_prob(params, steps.observations, steps.actions)
            return self.inner.loss(log_probs, steps)

        params = broadcast(theta, tasks)
        for steps in self.batches:
            params = adapt(
                loss, params, steps, self.inner.step_size, first_order=self.inner.first_order
            )
        return params

    def points(self) -> list[Params]:
        """Parameters before each inner step and after the last."""
        found = []
        for count in range(len(self.batches) + 1):
            params = replace(self, batches=self.batches[:count]).adapted(self.theta)
            found.append({name: p.detach() for name, p in params.items()})
        return found

    @contextmanager
    def objective(
        self,
        way: Linearise = linearise,
        *,
        threads: int = 1,
        size: int = 1,
        chosen: Tensor | None = None,
        scale: float = 1.0,
    ) -> Iterator[MetaObjective]:
        chunks = Chunks(threads, size)
        yield MetaObjective(
            *(self.inner, self.points(), self.batches, self.outer, chunks, way),
            chosen=chosen,
            scale=scale,
        )
        chunks.close()


def make_steps(policy: GaussianPolicy, theta: Params, seed: int, live: Sequence[int]) -> Steps:
    """Random steps of each task; what `theta` thinks of them, nearly, is stored as log pi."""
    rng = torch.Generator().manual_seed(seed)
    S = max(live) + 1
    dead = torch.arange(S) >= torch.tensor(live)[:, None]
    size = len(theta[LOG_STD])

    def draw(*shape: int) -> Tensor:
        values = torch.randn(len(live), S, *shape, generator=rng, dtype=torch.float64)
        return torch.where(dead.reshape(len(live), S, *[1] * len(shape)), POISON, values)

    observations, actions, advantages, off = draw(O), draw(size), draw(), draw()
    log_probs = policy.log_prob(theta, observations.flatten(0, 1), actions.flatten(0, 1))
    first = EPISODE * (torch.arange(S) // EPISODE)
    return Steps(
        observations=observations,
        actions=actions,
        advantages=advantages,
        log_probs=torch.where(dead, POISON, log_probs.reshape(len(live), S) + 0.1 * off),
        weights=torch.where(dead, 0.0, 1 / torch.tensor(live).double()[:, None]),
        first=torch.where(dead, 0, first),
    )


def make_problem(
    *,
    loss: str = "log-prob",
    steps: int = 1,
    first_order: bool = False,
    nonlinearity: str = "tanh",
    layers: tuple[int, ...] = NARROW,
    actions: int = A,
    policy: GaussianPolicy | None = None,
) -> Problem:
    if policy is None:
        settings = PolicySettings(layers=layers, nonlinearity=nonlinearity)  # type: ignore[arg-type]  # one of two
        policy = make_policy(settings, O, actions)
    theta = {name: p.double() for name, p in policy.initial_parameters(seed=1).items()}
    rng = torch.Generator().manual_seed(2)
    for name, p in theta.items():
        theta[name] = p + 0.2 * torch.randn(p.shape, generator=rng, dtype=torch.float64)
    batches = [
        make_steps(policy, theta, seed=3 + k, live=[n + k for n in (4, 3, 6)]) for k in range(steps)
    ]
    outer = make_steps(policy, theta, seed=9, live=LIVE)
    return Problem(InnerStep(policy, INNER_LOSSES[loss], ALPHA, first_order), theta, batches, outer)


def outputs(problem: Problem, params: Params, task: int) -> tuple[Tensor, Tensor]:
    """Means (n, A) of a task's n live steps, by plain matrix products, and log std (A,)."""
    hidden = problem.outer.observations[task, : LIVE[task]]
    layers = len(params) // 2
    relu = problem.inner.policy.network.nonlinearity == "relu"  # type: ignore[attr-defined]  # Mlp
    for i in range(layers):
        hidden = hidden @ params[f"mean.{i}.weight"] + params[f"mean.{i}.bias"]
        if i < layers - 1:
            hidden = hidden * (hidden > 0) if relu else torch.tanh(hidden)
    return hidden, params[LOG_STD].clamp(min=maml_rl.policy.MIN_LOG_STD)


def kl(old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor]) -> Tensor:
    """Sum over steps of KL(old || new), from the formula for one dimension at a time."""
    (m0, s0), (m, s) = old, new
    variance0, variance = torch.exp(2 * s0), torch.exp(2 * s)
    return (s - s0 + (variance0 + (m0 - m) ** 2) / (2 * variance) - 0.5).sum()


def mean_kl(problem: Problem) -> Callable[[Tensor], Tensor]:
    """KL from theta's adapted policies to those of another theta (d,), over live steps pooled."""
    old = {name: p.detach() for name, p in problem.adapted(problem.theta).items()}

    def function(vector: Tensor) -> Tensor:
        new = problem.adapted(unflatten(vector, problem.theta))
        total = torch.zeros((), dtype=torch.float64)
        for task in range(M):
            one, other = ({name: p[task] for name, p in params.items()} for params in (old, new))
            total = total + kl(outputs(problem, one, task), outputs(problem, other, task))
        return total / sum(LIVE)

    return function


def mean_surrogate(problem: Problem) -> Callable[[Tensor], Tensor]:
    """-mean over tasks of the mean over live steps of exp(log pi - log pi_old) A, of theta (d,)."""
    outer = problem.outer

    def function(vector: Tensor) -> Tensor:
        new = problem.adapted(unflatten(vector, problem.theta))
        total = torch.zeros((), dtype=torch.float64)
        for task, n in enumerate(LIVE):
            m, s = outputs(problem, {name: p[task] for name, p in new.items()}, task)
            z = (outer.actions[task, :n] - m) / torch.exp(s)
            log_probs = (-0.5 * z**2 - s - 0.5 * math.log(2 * math.pi)).sum(1)
            ratios = torch.exp(log_probs - outer.log_probs[task, :n])
            total = total - (ratios * outer.advantages[task, :n]).mean()
        return total / M

    return function


def kl_hessian(problem: Problem) -> Tensor:
    """(d, d). First order: sum_i J_i' F_i J_i at theta_i', each J by jacrev of the outputs."""
    vector = flatten(problem.theta)
    if not problem.inner.first_order:
        whole: Tensor = hessian(mean_kl(problem))(vector)
        return whole
    adapted = problem.adapted(problem.theta)
    total = torch.zeros(len(vector), len(vector), dtype=torch.float64)
    for task in range(M):
        point = flatten({name: p[task].detach() for name, p in adapted.items()})

        def means_and_log_std(vector: Tensor, task: int = task) -> tuple[Tensor, Tensor]:
            return outputs(problem, unflatten(vector, problem.theta), task)

        _, s = means_and_log_std(point)
        jm, js = jacrev(means_and_log_std)(point)
        total += torch.einsum("tai,a,taj->ij", jm, torch.exp(-2 * s), jm)
        total += 2 * LIVE[task] * torch.einsum("ai,aj->ij", js, js)
    return total / sum(LIVE)


CASES: list[tuple[str, str, int, bool, tuple[int, ...]]] = [
    (nonlinearity, loss, steps, first_order, layers)
    for nonlinearity in ("relu", "tanh")
    for loss in INNER_LOSSES
    for steps in (1, 2)
    for first_order in (False, True)
    for layers in (NARROW,)
]
CASES += [(nonlinearity, "dice", 1, False, WIDE) for nonlinearity in ("relu", "tanh")]
CASES += [("tanh", "likelihood-ratio", 2, False, WIDE), ("tanh", "log-prob", 1, False, ())]
CASES += [(nonlinearity, "log-prob", 0, False, NARROW) for nonlinearity in ("relu", "tanh")]


@pytest.mark.parametrize(("nonlinearity", "loss", "steps", "first_order", "layers"), CASES)
def test_the_product_is_with_the_hessian_of_the_kl(
    nonlinearity: str, loss: str, steps: int, first_order: bool, layers: tuple[int, ...]
) -> None:
    """H v with H = d^2/dtheta^2 of the mean KL(old || pi_theta'(theta)) at the old theta, which is
    P'J'FJP; first order, P = I. By hand and through the graph, to 1e-11 of H's largest entry."""
    problem = make_problem(
        loss=loss, steps=steps, first_order=first_order, nonlinearity=nonlinearity, layers=layers
    )
    H = kl_hessian(problem)
    assert H.abs().max() > 0.1
    rng = torch.Generator().manual_seed(7)
    vectors = torch.randn(3, len(H), generator=rng, dtype=torch.float64)
    for name, way in WAYS.items():
        with problem.objective(way) as objective:
            products = torch.stack([objective.product(v) for v in vectors])
        difference = (products - vectors @ H).abs().max() / H.abs().max()
        assert difference < 1e-11, (name, float(difference))


@pytest.mark.parametrize("loss", INNER_LOSSES)
def test_the_cases_can_tell_what_they_are_made_to_tell(loss: str) -> None:
    """The Hessian of each loss and order differs from every other's by over 1 %, and pooling over
    live steps from a mean of task means: no case would pass with another's answer."""
    problem = make_problem(loss=loss)
    H = kl_hessian(problem)
    others = [make_problem(loss=other) for other in INNER_LOSSES if other != loss]
    others.append(replace(problem, inner=replace(problem.inner, first_order=True)))
    others.append(replace(problem, inner=replace(problem.inner, step_size=1e-9)))
    for other in others:
        assert (kl_hessian(other) - H).abs().max() > 0.01 * H.abs().max()


def random_rows(seed: int, d: int) -> Tensor:
    """A vector for each task, (M, d)."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(M, d, generator=rng, dtype=torch.float64)


def linearised(problem: Problem, way: Linearise) -> Linearisation:
    return way(problem.inner, problem.points(), problem.batches, problem.outer)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("loss", INNER_LOSSES)
@pytest.mark.parametrize("steps", [0, 1, 2])
def test_push_is_the_derivative_of_adapting_and_pull_its_transpose(
    way: Linearise, loss: str, steps: int
) -> None:
    """push(v)_i = dtheta_i'/dtheta v_i by jacrev of `adapt`, and w'(P v) = (P'w)'v, a task at a
    time. Two steps' factors do not commute, so their order shows."""
    problem = make_problem(loss=loss, steps=steps)
    linear = linearised(problem, way)
    vector = flatten(problem.theta)
    v, w = random_rows(1, len(vector)), random_rows(2, len(vector))

    def adapted(vector: Tensor) -> Tensor:
        return flatten(problem.adapted(unflatten(vector, problem.theta)), axes=1)

    P = jacrev(adapted)(vector)
    pushed, pulled = linear.push(v), linear.pull(w)
    torch.testing.assert_close(pushed, torch.einsum("mij,mj->mi", P, v), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(pulled, torch.einsum("mji,mj->mi", P, w), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close((w * pushed).sum(1), (pulled * v).sum(1), rtol=1e-11, atol=1e-12)
    if steps == 2:
        assert (P - P.mT).abs().max() > 1e-3


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_first_order_neither_push_nor_pull_changes_a_vector(way: Linearise) -> None:
    """P = I exactly."""
    problem = make_problem(steps=2, first_order=True)
    linear = linearised(problem, way)
    v = random_rows(1, len(flatten(problem.theta)))
    assert torch.equal(linear.push(v), v)
    assert torch.equal(linear.pull(v), v)


@pytest.mark.parametrize("nonlinearity", ["relu", "tanh"])
@pytest.mark.parametrize("loss", INNER_LOSSES)
@pytest.mark.parametrize(
    ("layers", "actions"), [(NARROW, A), (WIDE, A), ((), 5), ((6, 18), 17), ((16,), 16)]
)
def test_by_hand_is_what_the_graph_gives(
    layers: tuple[int, ...], actions: int, loss: str, nonlinearity: str
) -> None:
    """push, pull and fisher agree for widths on both sides of curvature.NARROW, the output too."""
    problem = make_problem(
        loss=loss, steps=2, layers=layers, actions=actions, nonlinearity=nonlinearity
    )
    one, other = (linearised(problem, way) for way in WAYS.values())
    v = random_rows(3, len(flatten(problem.theta)))
    for a, b in (
        (one.push(v), other.push(v)),
        (one.pull(v), other.pull(v)),
        (one.fisher(v, problem.outer.weights), other.fisher(v, problem.outer.weights)),
    ):
        assert (a - b).abs().max() < 1e-10 * b.abs().max()


def test_fisher_by_hand() -> None:
    """One task, no hidden layer: mean = w o + b, so J'FJ for (w, b, log_std) is
    sum_t weight_t [o^2, o, 0; o, 1, 0; 0, 0, 2 std^2] / std^2. o = 1 and 3, std = 1/2."""
    policy = make_policy(PolicySettings(layers=()), 1, 1)
    theta = {
        "mean.0.weight": torch.tensor([[0.3]]),
        "mean.0.bias": torch.tensor([-0.2]),
        LOG_STD: torch.tensor([-math.log(2)]),
    }
    outer = Steps(
        observations=torch.tensor([[[1.0], [3.0], [POISON]]]),
        actions=torch.full((1, 3, 1), POISON),
        advantages=torch.full((1, 3), POISON),
        log_probs=torch.full((1, 3), POISON),
        weights=torch.tensor([[0.25, 0.5, 0.0]]),
        first=torch.zeros(1, 3, dtype=torch.int64),
    )
    inner = InnerStep(policy, INNER_LOSSES["log-prob"], ALPHA, False)
    expected = torch.tensor(
        [
            [4 * (0.25 * 1 + 0.5 * 9), 4 * (0.25 * 1 + 0.5 * 3), 0.0],
            [4 * (0.25 * 1 + 0.5 * 3), 4 * 0.75, 0.0],
            [0.0, 0.0, 2 * 0.75],
        ]
    )
    for way in WAYS.values():
        linear = way(inner, [broadcast(theta, 1)], [], outer)
        rows = [linear.fisher(e[None], outer.weights)[0] for e in torch.eye(3)]
        torch.testing.assert_close(torch.stack(rows), expected)


@pytest.fixture
def clamp_at_half(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lowest log std is -1/2, where numbers stay of order 1, instead of log 1e-6."""
    for module in ("policy", "curvature"):
        monkeypatch.setattr(f"maml_rl.{module}.MIN_LOG_STD", -0.5)


def with_log_std(problem: Problem, values: Sequence[float]) -> Problem:
    values_of = {LOG_STD: torch.tensor(values, dtype=torch.float64)}
    return replace(problem, theta=problem.theta | values_of)


@pytest.mark.usefixtures("clamp_at_half")
@pytest.mark.parametrize("loss", INNER_LOSSES)
@pytest.mark.parametrize("steps", [0, 1, 2])
def test_a_log_std_below_its_clamp_neither_moves_nor_counts(loss: str, steps: int) -> None:
    """Clamped, log_std has no gradient and no curvature: its row of J'FJP is 0, and the noise that
    the others see is the clamp's."""
    problem = with_log_std(make_problem(loss=loss, steps=steps), [-3.0, 0.4])
    adapted = problem.adapted(problem.theta)[LOG_STD]
    assert adapted[:, 0].tolist() == [-3.0] * M
    d = len(flatten(problem.theta))
    v = random_rows(4, d)
    index = d - A  # log_std is flattened last.
    found = []
    for way in WAYS.values():
        linear = linearised(problem, way)
        image = linear.pull(linear.fisher(linear.push(v), problem.outer.weights))
        assert not image[:, index].any()
        assert image[:, index + 1].abs().min() > 1e-3
        assert torch.equal(linear.push(v)[:, index], v[:, index])
        found.append(image)
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-11)
    H = kl_hessian(problem)
    assert not H[index].any()
    for way in WAYS.values():
        with problem.objective(way) as objective:
            torch.testing.assert_close(objective.product(v[0]), H @ v[0], rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("clamp_at_half")
def test_at_the_clamp_itself_both_ways_agree_with_autograd() -> None:
    """clamp has slope 1 where the value equals the bound, as a policy that starts there does."""
    problem = with_log_std(make_problem(steps=0), [-0.5, 0.4])
    v = random_rows(5, len(flatten(problem.theta)))
    one, other = (
        linearised(problem, way).fisher(v, problem.outer.weights) for way in WAYS.values()
    )
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-11)


class Odd(torch.nn.Module):
    """A mean that is no MLP: a gated product, with a parameter that is a single number."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(O, A)
        self.gate = torch.nn.Parameter(torch.tensor(0.7))

    def forward(self, observations: Tensor) -> Tensor:
        gated: Tensor = self.linear(observations) * torch.sigmoid(self.gate * observations[:, :1])
        return gated


def test_any_module_goes_through_the_graph() -> None:
    """A module's product is with the Hessian of its KL, and by hand is refused for it."""
    torch.manual_seed(0)
    policy = GaussianPolicy(ModuleNetwork(Odd()), A)
    problem = make_problem(policy=policy)
    old = {name: p.detach() for name, p in problem.adapted(problem.theta).items()}

    def function(vector: Tensor) -> Tensor:
        new = problem.adapted(unflatten(vector, problem.theta))
        total = torch.zeros((), dtype=torch.float64)
        for task, n in enumerate(LIVE):
            one, other = (
                (
                    policy.network(
                        {name: p[task] for name, p in params.items()},
                        problem.outer.observations[task, :n],
                    ),
                    params[LOG_STD][task],
                )
                for params in (old, new)
            )
            total = total + kl(one, other)
        return total / sum(LIVE)

    vector = flatten(problem.theta)
    H: Tensor = hessian(function)(vector)
    with problem.objective() as objective:
        torch.testing.assert_close(objective.product(vector), H @ vector, rtol=1e-10, atol=1e-12)
        surrogate, divergence = objective.evaluate(vector + 0.01)
    assert math.isclose(divergence, function(vector + 0.01).item(), rel_tol=1e-9)
    assert math.isfinite(surrogate)
    with pytest.raises(TypeError, match="needs an Mlp"):
        MlpLinearisation(problem.inner, problem.points(), problem.batches, problem.outer)


@pytest.mark.parametrize("steps", [0, 1, 2])
@pytest.mark.parametrize("loss", INNER_LOSSES)
def test_the_gradient_is_the_slope_of_the_surrogate(loss: str, steps: int) -> None:
    """d/dtheta of the surrogate through theta'(theta): by autograd through `adapt`, and by central
    differences of MetaObjective.evaluate, h = 1e-5.

    Not so for dice, whose derivatives are made to stand for those of an expectation: the value of
    its gradient is the log-prob loss's at every theta, and so is what differences see.
    """
    problem = make_problem(loss=loss, steps=steps)
    vector = flatten(problem.theta)
    leaf = vector.clone().requires_grad_()
    (expected,) = torch.autograd.grad(mean_surrogate(problem)(leaf), leaf)
    for way in WAYS.values():
        with problem.objective(way) as objective:
            gradient = objective.gradient()
        assert gradient.dtype == torch.float64
        torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)
    if loss == "dice":
        log_prob = make_problem(loss="log-prob", steps=steps)
        leaf = vector.clone().requires_grad_()
        (expected,) = torch.autograd.grad(mean_surrogate(log_prob)(leaf), leaf)
    differences, h = torch.zeros_like(vector), 1e-5
    with problem.objective() as objective:
        for k in range(len(vector)):
            shift = torch.zeros_like(vector)
            shift[k] = h
            above, below = (objective.evaluate(vector + s)[0] for s in (shift, -shift))
            differences[k] = (above - below) / (2 * h)
    torch.testing.assert_close(expected, differences, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("steps", [1, 2])
def test_the_first_order_gradient_leaves_out_the_inner_curvature(steps: int) -> None:
    """It is the surrogate's slope at theta', summed over tasks: autograd with inner gradients
    detached; and it differs from the second order's."""
    problem = make_problem(steps=steps, first_order=True)
    leaf = flatten(problem.theta).requires_grad_()
    (expected,) = torch.autograd.grad(mean_surrogate(problem)(leaf), leaf)
    for way in WAYS.values():
        with problem.objective(way) as objective:
            gradient = objective.gradient()
        torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)
    second = replace(problem, inner=replace(problem.inner, first_order=False))
    (other,) = torch.autograd.grad(mean_surrogate(second)(leaf), leaf)
    assert (expected - other).abs().max() > 1e-2


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_evaluating_at_theta_itself_gives_kl_0(steps: int) -> None:
    """KL(old || old) = 0 exactly, and the surrogate is that of adapting anew by `adapt`."""
    problem = make_problem(steps=steps)
    vector = flatten(problem.theta)
    with problem.objective() as objective:
        surrogate, divergence = objective.evaluate(vector)
    assert divergence == 0.0
    assert math.isclose(surrogate, float(mean_surrogate(problem)(vector)), rel_tol=1e-12)


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("steps", [0, 1, 2])
def test_evaluating_elsewhere_adapts_anew_from_there(steps: int, first_order: bool) -> None:
    """Surrogate and KL at theta + 0.05 N(0, 1), adapted by `adapt`; the values of both orders are
    the same, for only derivatives differ."""
    problem = make_problem(steps=steps, first_order=first_order, loss="dice")
    candidate = flatten(problem.theta) + 0.05 * random_rows(6, len(flatten(problem.theta)))[0]
    with problem.objective() as objective:
        surrogate, divergence = objective.evaluate(candidate)
    assert divergence > 1e-3
    assert math.isclose(surrogate, float(mean_surrogate(problem)(candidate)), rel_tol=1e-12)
    assert math.isclose(divergence, float(mean_kl(problem)(candidate)), rel_tol=1e-10)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_metric_is_estimated_from_the_chosen_tasks(size: int) -> None:
    """Their shares of the product, times the scale; with all of them it is the product, and no
    other number of the objective depends on it. Chunks may be larger than what is chosen."""
    problem = make_problem(steps=1)
    vector = flatten(problem.theta)
    chosen = torch.tensor([True, False, True])
    with problem.objective(size=size, chosen=chosen, scale=1.5) as objective:
        shares = objective.product_terms(vector)
        expected = 1.5 * (shares[0] + shares[2])
        assert float((expected - objective.product(vector)).abs().max()) > 1e-3
        torch.testing.assert_close(objective.metric(vector), expected, rtol=1e-12, atol=1e-14)
        gradient = objective.gradient()
    with problem.objective(size=size, chosen=torch.ones(3, dtype=torch.bool)) as objective:
        assert torch.equal(objective.metric(vector), objective.product(vector))
        assert torch.equal(objective.gradient(), gradient)


@pytest.mark.parametrize(
    ("tasks", "share", "chosen"),
    [
        (40, 0.25, [*range(4), *range(16, 20), *range(32, 36)]),
        (40, 0.5, [i for i in range(40) if i % 8 < 4]),
        (20, 0.01, list(range(4))),
        (20, 1e-300, list(range(4))),
        (7, 0.3, [0, 3, 6]),
        (9, 0.3, [0, 1, 2]),
        (8, 1.0, list(range(8))),
        (4, 0.1, list(range(4))),
    ],
)
def test_whole_chunks_evenly_spaced_are_chosen(tasks: int, share: float, chosen: list[int]) -> None:
    """At least one, and never less than the share."""
    found = metric_tasks(tasks, share)
    assert found.nonzero().flatten().tolist() == chosen
    assert len(found) == tasks


def everything(problem: Problem, threads: int, size: int) -> tuple[list[Tensor], list[float]]:
    """All that a trust-region step asks for."""
    vector = flatten(problem.theta)
    with problem.objective(threads=threads, size=size) as objective:
        values = [*objective.evaluate(vector), *objective.evaluate(vector + 0.01)]
        tensors = [objective.gradient(), objective.product(vector)]
    return tensors, values


def in_float32(problem: Problem) -> Problem:
    """What training computes with."""

    def single(steps: Steps) -> Steps:
        return Steps(*(t.float() if t.is_floating_point() else t for t in steps))

    theta = {name: p.float() for name, p in problem.theta.items()}
    return replace(
        problem,
        theta=theta,
        batches=list(map(single, problem.batches)),
        outer=single(problem.outer),
    )


@pytest.mark.parametrize("size", [1, 2])
def test_the_number_of_threads_changes_no_bit(size: int) -> None:
    """Chunks' terms are added in task order whatever thread made them; in float32."""
    problem = in_float32(make_problem(steps=2, layers=WIDE, loss="dice"))
    tensors, values = everything(problem, 1, size)
    for threads in (2, 3):
        others, again = everything(problem, threads, size)
        assert values == again
        assert all(torch.equal(a, b) for a, b in zip(tensors, others, strict=True))


@pytest.mark.parametrize("keep", [True, False])
def test_linearisations_are_kept_or_made_again_with_the_same_bits(keep: bool) -> None:
    """On a GPU in chunks they are made again for every product, one chunk at a time."""
    problem = in_float32(make_problem(steps=2, layers=WIDE))
    made: list[int] = []

    def counted(*arguments: Any) -> Linearisation:
        made.append(len(arguments[3].weights))
        return linearise(*arguments)

    with problem.objective() as usual:
        expected, d = usual.gradient(), len(usual.gradient())
        vector = torch.linspace(-1.0, 1.0, d)
        product = usual.product(vector)
    chunks = Chunks(1, 1)
    objective = MetaObjective(
        problem.inner, problem.points(), problem.batches, problem.outer, chunks, counted, keep=keep
    )
    assert torch.equal(objective.gradient(), expected)
    assert torch.equal(objective.product(vector), product)
    assert made == [1] * 3 * (1 if keep else 2)
    chunks.close()


@pytest.mark.parametrize("layers", [NARROW, WIDE])
def test_the_size_of_chunks_changes_nothing_but_rounding(layers: tuple[int, ...]) -> None:
    """One task at a time, two (of three, so that a chunk is short), and all at once."""
    problem = make_problem(steps=2, layers=layers)
    tensors, values = everything(problem, 2, 1)
    for size in (2, 0):
        others, again = everything(problem, 2, size)
        torch.testing.assert_close(values, again, rtol=1e-12, atol=1e-14)
        for a, b in zip(tensors, others, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


def test_tasks_do_not_mix() -> None:
    """With task 1's data poisoned, every other task's push, pull and fisher keep their bits."""
    problem = make_problem(steps=1, layers=WIDE)
    v = random_rows(8, len(flatten(problem.theta)))

    def poison(steps: Steps) -> Steps:
        actions, advantages = steps.actions.clone(), steps.advantages.clone()
        actions[1] = advantages[1] = -POISON
        return steps._replace(actions=actions, advantages=advantages)

    other = replace(problem, batches=[poison(b) for b in problem.batches])
    for way in WAYS.values():
        one, two = linearised(problem, way), linearised(other, way)
        for a, b in ((one.push(v), two.push(v)), (one.pull(v), two.pull(v))):
            assert torch.equal(a[[0, 2]], b[[0, 2]])
            assert not torch.equal(a[1], b[1])
