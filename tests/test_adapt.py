"""The inner loop, against the one policy whose gradient fits on a line, and against differences."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.func import jacrev

from maml_rl.adapt import Params, adapt, broadcast, flatten, unflatten


class Steps(NamedTuple):
    actions: Tensor
    advantages: Tensor
    alive: Tensor


def unit_gaussian_loss(params: Params, steps: Steps) -> Tensor:
    """-mean over live steps of A log N(a; w, 1); d log N / dw = a - w."""
    log_prob = -0.5 * (steps.actions - params["w"]) ** 2
    return -(log_prob * steps.advantages * steps.alive).sum() / steps.alive.sum()


# Two tasks of three steps; the third comes after the fall and must not count.
STEPS = Steps(
    actions=torch.tensor([[1.0, -1.0, 99.0], [3.0, 1.0, 99.0]]),
    advantages=torch.tensor([[2.0, 1.0, 99.0], [1.0, 2.0, 99.0]]),
    alive=torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0]]),
)


@pytest.mark.parametrize(("first_order", "slope"), [(False, 0.85), (True, 1.0)])
def test_each_task_follows_its_own_policy_gradient(first_order: bool, slope: float) -> None:
    """w' = w + 0.1 mean[A (a - w)] over live steps, hence dw'/dw = 1 - 0.1 mean[A]."""

    def adapted(w: Tensor) -> Tensor:
        return adapt(unit_gaussian_loss, {"w": w}, STEPS, 0.1, first_order=first_order)["w"]

    start = torch.zeros(2)
    torch.testing.assert_close(adapted(start), torch.tensor([0.05, 0.25]))
    # Diagonal: no task's parameters reach another task.
    torch.testing.assert_close(jacrev(adapted)(start), slope * torch.eye(2))


def test_a_second_step_starts_where_the_first_ended() -> None:
    """w'' = w' + 0.1 mean[A (a - w')], and dw''/dw = (1 - 0.1 mean[A])^2 = .85^2."""

    def adapted(w: Tensor) -> Tensor:
        once = adapt(unit_gaussian_loss, {"w": w}, STEPS, 0.1)
        return adapt(unit_gaussian_loss, once, STEPS, 0.1)["w"]

    start = torch.zeros(2)
    # mean[A a] is .5 and 2.5, mean[A] is 1.5 in both tasks.
    expected = torch.tensor([0.05 + 0.1 * (0.5 - 1.5 * 0.05), 0.25 + 0.1 * (2.5 - 1.5 * 0.25)])
    torch.testing.assert_close(adapted(start), expected)
    torch.testing.assert_close(jacrev(adapted)(start), 0.85**2 * torch.eye(2))


class Regression(NamedTuple):
    inputs: Tensor
    targets: Tensor


TASKS, ROWS, IN, OUT, ALPHA = 3, 4, 2, 5, 0.3


def regression_loss(params: Params, data: Regression) -> Tensor:
    """Curved in both parameters, so that no derivative of the step is trivial."""
    predicted = torch.tanh(data.inputs @ params["weight"]) * torch.exp(params["scale"])
    return (predicted - data.targets).square().mean()


def make_regression(seed: int) -> tuple[Params, Regression, Regression]:
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    theta = {"weight": draw(IN, OUT), "scale": 0.3 * draw(OUT)}
    train, test = (Regression(draw(TASKS, ROWS, IN), draw(TASKS, ROWS, OUT)) for _ in range(2))
    return theta, train, test


def one_task_at_a_time(
    theta: Params, train: Regression, test: Regression, moves: Callable[[int, Params], Params]
) -> float:
    """Mean of the tasks' losses on `test` where `moves` takes task i's parameters to adapted."""
    total = 0.0
    for i in range(TASKS):
        adapted = moves(i, theta)
        total += float(regression_loss(adapted, Regression(test.inputs[i], test.targets[i])))
    return total / TASKS


def plain_gradient(params: Params, data: Regression) -> Params:
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    gradients = torch.autograd.grad(regression_loss(leaves, data), list(leaves.values()))
    return dict(zip(leaves, gradients, strict=True))


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("first_order", [False, True])
def test_the_meta_gradient_is_the_slope_of_the_adapted_loss(first_order: bool, steps: int) -> None:
    """d/d theta of mean_i L_i(theta_i'), against [f(theta + h e) - f(theta - h e)] / 2h.

    theta_i' is recomputed by plain autograd, a task at a time. First order: theta_i' = theta
    - alpha g_i with g_i frozen at the theta around which the difference is taken.
    """
    theta, train, test = make_regression(seed=steps)

    def own(i: int) -> Regression:
        return Regression(train.inputs[i], train.targets[i])

    def walk(i: int, start: Params) -> Params:
        for _ in range(steps):
            gradient = plain_gradient(start, own(i))
            start = {name: p - ALPHA * gradient[name] for name, p in start.items()}
        return start

    frozen = [{name: walk(i, theta)[name] - p for name, p in theta.items()} for i in range(TASKS)]

    def move(i: int, start: Params) -> Params:
        if first_order:
            return {name: p + frozen[i][name] for name, p in start.items()}
        return walk(i, start)

    leaves = {name: p.clone().requires_grad_() for name, p in theta.items()}
    adapted = broadcast(leaves, TASKS)
    for _ in range(steps):
        adapted = adapt(regression_loss, adapted, train, ALPHA, first_order=first_order)
    value = torch.func.vmap(regression_loss)(adapted, test).mean()
    gradient = flatten(
        dict(zip(leaves, torch.autograd.grad(value, list(leaves.values())), strict=True))
    )

    point, h = flatten(theta), 1e-5
    differences = torch.zeros_like(point)
    for k in range(len(point)):
        shift = torch.zeros_like(point)
        shift[k] = h
        above, below = (
            one_task_at_a_time(unflatten(p, theta), train, test, move)
            for p in (point + shift, point - shift)
        )
        differences[k] = (above - below) / (2 * h)
    assert math.isclose(value.item(), one_task_at_a_time(theta, train, test, move), rel_tol=1e-12)
    torch.testing.assert_close(gradient, differences, rtol=1e-7, atol=1e-8)
    # The two orders differ by more than the tolerance, so that this test tells them apart.
    other = broadcast(leaves, TASKS)
    for _ in range(steps):
        other = adapt(regression_loss, other, train, ALPHA, first_order=not first_order)
    elsewhere = torch.autograd.grad(
        torch.func.vmap(regression_loss)(other, test).mean(), list(leaves.values())
    )
    assert (torch.cat([g.flatten() for g in elsewhere]) - differences).abs().max() > 1e-2


def test_adapting_leaves_its_arguments_alone() -> None:
    """A pure function: parameters and data are what they were, bit for bit."""
    theta, train, _ = make_regression(seed=3)
    before = [p.clone() for p in [*theta.values(), *train]]
    adapt(regression_loss, broadcast(theta, TASKS), train, ALPHA)
    assert all(torch.equal(a, b) for a, b in zip(before, [*theta.values(), *train], strict=True))


@pytest.mark.parametrize("step_size", [0.0, -0.1, math.nan])
def test_a_step_size_that_is_not_positive_is_refused(step_size: float) -> None:
    with pytest.raises(ValueError, match=f"step_size must be positive, got {step_size}"):
        adapt(unit_gaussian_loss, {"w": torch.zeros(2)}, STEPS, step_size)


# --- A step size by name.


def mixed_sizes() -> Params:
    """A number for every entry of the weight, some of them negative."""
    return {"weight": torch.linspace(-0.2, 0.4, IN * OUT, dtype=torch.float64).reshape(IN, OUT)}


@pytest.mark.parametrize("first_order", [False, True])
def test_one_size_for_all_is_the_same_size_by_name(first_order: bool) -> None:
    """Bit for bit, derivative and all."""
    theta, train, test = make_regression(seed=6)

    def found(step_size: float | Mapping[str, float | Tensor]) -> tuple[Tensor, Tensor]:
        leaves = {name: p.clone().requires_grad_() for name, p in theta.items()}
        adapted = adapt(
            regression_loss, broadcast(leaves, TASKS), train, step_size, first_order=first_order
        )
        value = torch.func.vmap(regression_loss)(adapted, test).mean()
        slopes = torch.autograd.grad(value, list(leaves.values()))
        return flatten(adapted, axes=1).detach(), flatten(dict(zip(leaves, slopes, strict=True)))

    one, named = found(ALPHA), found(dict.fromkeys(reversed(theta), ALPHA))
    assert torch.equal(one[0], named[0])
    assert torch.equal(one[1], named[1])


@pytest.mark.parametrize("scale_size", [0.7, torch.tensor(-0.7, dtype=torch.float64)])
def test_each_parameter_has_its_own_size(scale_size: float | Tensor) -> None:
    """A number or a tensor () for one, a tensor (IN, OUT) for the other, task by task."""
    theta, train, _ = make_regression(seed=7)
    sizes: dict[str, float | Tensor] = {**mixed_sizes(), "scale": scale_size}
    adapted = adapt(regression_loss, broadcast(theta, TASKS), train, sizes)
    assert list(adapted) == list(theta)
    for i in range(TASKS):
        gradient = plain_gradient(theta, Regression(train.inputs[i], train.targets[i]))
        for name, p in theta.items():
            expected = p - sizes[name] * gradient[name]
            torch.testing.assert_close(adapted[name][i], expected, rtol=1e-12, atol=1e-14)


def test_what_has_no_size_stays_and_is_still_differentiated() -> None:
    """With a loss w^2 s / 2 and w alone adapted: w' = w (1 - .1 s), s' = s.

    Hence dw'/ds = -.1 w, although s itself takes no step.
    """

    def loss(params: Params, data: Tensor) -> Tensor:
        return 0.5 * params["w"] ** 2 * params["s"] * data

    def adapted(w: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        after = adapt(loss, {"s": s, "w": w}, torch.ones(2), {"w": 0.1})
        return after["w"], after["s"]

    w, s = torch.tensor([3.0, -5.0]), torch.tensor([2.0, 4.0])
    after_w, after_s = adapted(w, s)
    torch.testing.assert_close(after_w, torch.tensor([3 * 0.8, -5 * 0.6]))
    assert torch.equal(after_s, s)
    (w_by_w, w_by_s), (s_by_w, s_by_s) = jacrev(adapted, argnums=(0, 1))(w, s)
    torch.testing.assert_close(w_by_w, torch.diag(torch.tensor([0.8, 0.6])))
    torch.testing.assert_close(w_by_s, torch.diag(torch.tensor([-0.3, 0.5])))
    assert torch.equal(s_by_w, torch.zeros(2, 2))
    assert torch.equal(s_by_s, torch.eye(2))


@pytest.mark.parametrize("first_order", [False, True])
def test_a_learned_size_is_differentiated_by_hand(first_order: bool) -> None:
    """w' = w + a mean[A (act - w)], so dw'/da = .5 and 2.5 at w = 0, whatever its sign or order.

    After a second step with the same a: w'' = w' + a (mean[A act] - 1.5 w'), and at a = -.2
    dw''/da = dw'/da (1 - 1.5 a) + (mean[A act] - 1.5 w'); first order: dw'/da + the same.
    """

    def adapted(a: Tensor, steps: int) -> Tensor:
        w = torch.zeros(2)
        for _ in range(steps):
            w = adapt(unit_gaussian_loss, {"w": w}, STEPS, {"w": a}, first_order=first_order)["w"]
        return w

    a, pull = torch.tensor(-0.2), torch.tensor([0.5, 2.5])
    torch.testing.assert_close(adapted(a, 1), -0.2 * pull)
    torch.testing.assert_close(jacrev(adapted)(a, 1), pull)
    through = 1.0 if first_order else 1 + 1.5 * 0.2
    torch.testing.assert_close(jacrev(adapted)(a, 2), pull * through + pull - 1.5 * (-0.2 * pull))


def test_a_size_of_no_parameter_is_refused() -> None:
    with pytest.raises(ValueError, match="there is a step size for 'v', which is no parameter"):
        adapt(unit_gaussian_loss, {"w": torch.zeros(2)}, STEPS, {"w": 0.1, "v": 0.1})


@pytest.mark.parametrize("size", [0.0, -0.1, math.nan])
def test_a_number_by_name_that_is_not_positive_is_refused(size: float) -> None:
    """Where it is a tensor it may have been learned, and have any sign."""
    theta, train, _ = make_regression(seed=1)
    with pytest.raises(ValueError, match=f"step_size must be positive, got {size}"):
        adapt(regression_loss, theta, train, {"weight": 0.1, "scale": size})


THETA = {
    "b": torch.arange(6.0).reshape(2, 3),
    "a": torch.tensor(6.0),
    "c": torch.arange(7.0, 11.0),
}


def test_flatten_joins_in_the_order_of_names_as_given() -> None:
    """b (2, 3), a (), c (4): 11 numbers, row by row."""
    assert flatten(THETA).tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]


@pytest.mark.parametrize("tasks", [None, 5])
def test_unflatten_is_the_inverse_of_flatten(tasks: int | None) -> None:
    """unflatten(flatten(x)) = x and flatten(unflatten(v)) = v, with a task axis and without."""
    shape = (11,) if tasks is None else (tasks, 11)
    vector = torch.arange(float(math.prod(shape))).reshape(shape) + 100.0
    params = unflatten(vector, THETA)
    leading = shape[:-1]
    assert {n: tuple(p.shape) for n, p in params.items()} == {
        "b": (*leading, 2, 3),
        "a": leading,
        "c": (*leading, 4),
    }
    axes = 0 if tasks is None else 1
    assert torch.equal(flatten(params, axes=axes), vector)
    again = unflatten(flatten(params, axes=axes), THETA)
    assert all(torch.equal(again[name], params[name]) for name in THETA)


def test_a_task_axis_keeps_tasks_in_rows() -> None:
    """Row i of flatten(params, axes=1) is flatten of task i's parameters alone."""
    params = {name: torch.stack([p, p + 50.0, p - 70.0]) for name, p in THETA.items()}
    rows = flatten(params, axes=1)
    assert rows.shape == (3, 11)
    for i in range(3):
        assert torch.equal(rows[i], flatten({name: p[i] for name, p in params.items()}))


def test_broadcast_gives_every_task_theta_without_a_copy() -> None:
    """Every task reads theta's own memory: stride 0 along tasks."""
    params = broadcast(THETA, 5)
    for name, p in THETA.items():
        assert params[name].shape == (5, *p.shape)
        assert params[name].stride()[0] == 0
        assert params[name].data_ptr() == p.data_ptr()
        assert all(torch.equal(row, p) for row in params[name])
