"""The trust region, against problems whose solution is a formula."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from maml_rl.trust_region import (
    Refusal,
    Report,
    TrustRegionSettings,
    conjugate_gradient,
    trust_region_step,
)

D = 7


def symmetric(eigenvalues: Tensor, seed: int) -> Tensor:
    """A symmetric matrix (d, d) float64 with these eigenvalues and random axes."""
    d = len(eigenvalues)
    rng = torch.Generator().manual_seed(seed)
    axes, _ = torch.linalg.qr(torch.randn(d, d, generator=rng, dtype=torch.float64))
    matrix: Tensor = axes @ torch.diag(eigenvalues.double()) @ axes.T
    return matrix


def draw(size: int, seed: int) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=rng, dtype=torch.float64)


@dataclass
class Quadratic:
    """Surrogate g'x + x'Bx / 2 and divergence scale x'Hx / 2, with x = candidate - theta."""

    theta: Tensor
    slope: Tensor
    hessian: Tensor
    bend: Tensor | None = None
    scale: float = 1.0
    """Of the divergence over what its Hessian says."""
    estimate: Tensor | None = None
    """What the metric says in place of H; None where it must not be asked."""
    seen: list[Tensor] = field(default_factory=list)
    """Candidates evaluated, theta first."""
    products: int = 0
    """Asked for."""

    def gradient(self) -> Tensor:
        return self.slope

    def product(self, vector: Tensor) -> Tensor:
        assert vector.dtype == self.theta.dtype
        self.products += 1
        return self.hessian.to(vector.dtype) @ vector

    def metric(self, vector: Tensor) -> Tensor:
        assert self.estimate is not None
        return self.estimate @ vector

    def evaluate(self, candidate: Tensor) -> tuple[float, float]:
        self.seen.append(candidate.clone())
        x = (candidate - self.theta).double()
        bent = 0.0 if self.bend is None else 0.5 * float(x @ self.bend @ x)
        return 3.0 + float(self.slope @ x) + bent, self.scale * 0.5 * float(x @ self.hessian @ x)


def quadratic(**fields: object) -> Quadratic:
    problem = {
        "theta": draw(D, seed=1),
        "slope": draw(D, seed=2),
        "hessian": symmetric(torch.linspace(0.5, 20.0, D), seed=3),
    }
    return Quadratic(**(problem | fields))  # type: ignore[arg-type]  # fields by name


EXACT = TrustRegionSettings(cg_iterations=D, damping=1e-9)


def check_refused(objective: Quadratic, reason: str, backtracks: int = 0) -> Report:
    """The very same theta comes back, bit for bit, and the report says why."""
    before = objective.theta.clone()
    theta, report = trust_region_step(objective, objective.theta, EXACT)
    assert theta is objective.theta
    assert torch.equal(theta, before)
    assert not report.accepted
    assert (report.refused_because, report.backtracks) == (reason, backtracks)
    assert report.kl == 0.0
    assert report.surrogate_after == report.surrogate_before or math.isnan(report.surrogate_before)
    return report


def test_conjugate_gradient_is_exact_after_d_products() -> None:
    """In d dimensions A x = b is solved by d products with A, and by no fewer."""
    matrix, target = symmetric(torch.linspace(1.0, 50.0, D), seed=4), draw(D, seed=5)
    products = 0

    def product(vector: Tensor) -> Tensor:
        nonlocal products
        products += 1
        return matrix @ vector

    x, residual, complaint = conjugate_gradient(product, target, D)
    assert (complaint, products) == (None, D)
    torch.testing.assert_close(x, torch.linalg.solve(matrix, target), rtol=1e-9, atol=1e-11)
    assert residual.norm() < 1e-9 * target.norm()
    early, rest, _ = conjugate_gradient(product, target, D - 1)
    torch.testing.assert_close(rest, target - matrix @ early, rtol=1e-9, atol=1e-11)
    assert rest.norm() > 1e-6 * target.norm()


def test_conjugate_gradient_stops_when_nothing_is_left() -> None:
    """Along an eigenvector one product solves it, and no more are asked for."""
    products = 0

    def product(vector: Tensor) -> Tensor:
        nonlocal products
        products += 1
        return 4.0 * vector

    x, residual, complaint = conjugate_gradient(product, torch.tensor([8.0, -2.0]).double(), 10)
    assert (products, complaint) == (1, None)
    assert (x.tolist(), residual.tolist()) == ([2.0, -0.5], [0.0, 0.0])


def test_conjugate_gradient_tells_of_negative_curvature() -> None:
    """diag(1, -1), b = (2, 1): the first direction has curvature 3 and is gone along by 5/3; the
    next is not positive, so x is where the first ended."""
    matrix = torch.diag(torch.tensor([1.0, -1.0])).double()
    target = torch.tensor([2.0, 1.0]).double()
    x, residual, complaint = conjugate_gradient(lambda v: matrix @ v, target, 10)
    assert complaint is Refusal.CURVATURE_NOT_POSITIVE
    torch.testing.assert_close(x, target * 5 / 3)
    torch.testing.assert_close(residual, target - matrix @ x)


@pytest.mark.parametrize("curvature", [-1.0, 0.0, math.nan])
def test_curvature_that_is_not_positive_is_not_followed(curvature: float) -> None:
    """Not even by one step: x is 0."""
    x, _, complaint = conjugate_gradient(lambda v: curvature * v, torch.ones(3).double(), 5)
    assert complaint is not None
    assert x.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("max_kl", [0.01, 0.3])
def test_a_quadratic_reaches_the_analytic_point(max_kl: float) -> None:
    """theta - sqrt(2 max_kl / g'H^-1 g) H^-1 g, where the divergence is max_kl exactly."""
    objective = quadratic()
    theta, report = trust_region_step(
        objective, objective.theta, TrustRegionSettings(max_kl=max_kl, cg_iterations=D, damping=0)
    )
    natural = torch.linalg.solve(objective.hessian, objective.slope)
    length = math.sqrt(2 * max_kl / float(objective.slope @ natural))
    expected = objective.theta - length * natural
    # Rounding may put the divergence a bit above max_kl, and then one step back is taken.
    back = 0.8**report.backtracks
    assert report.backtracks <= 1
    torch.testing.assert_close(
        theta, objective.theta + back * (expected - objective.theta), rtol=1e-9, atol=1e-11
    )
    damped = TrustRegionSettings(max_kl=max_kl, cg_iterations=D, damping=1e-9)
    theta, report = trust_region_step(objective, objective.theta, damped)
    assert (report.accepted, report.backtracks, report.refused_because) == (True, 0, "")
    torch.testing.assert_close(theta, expected, rtol=1e-7, atol=1e-9)
    assert math.isclose(report.kl, max_kl, rel_tol=1e-6)
    assert report.kl <= max_kl
    assert report.surrogate_before == 3.0
    gain = math.sqrt(2 * max_kl * float(objective.slope @ natural))
    assert math.isclose(report.surrogate_after, 3.0 - gain, rel_tol=1e-7)
    assert report.cg_residual < 1e-9


def test_damping_is_added_to_the_curvature() -> None:
    """theta - sqrt(2 max_kl / g'A^-1 g) A^-1 g with A = H + 2 I."""
    objective = quadratic()
    theta, report = trust_region_step(
        objective, objective.theta, TrustRegionSettings(cg_iterations=D, damping=2.0)
    )
    damped = objective.hessian + 2.0 * torch.eye(D)
    natural = torch.linalg.solve(damped, objective.slope)
    length = math.sqrt(2 * 0.01 / float(objective.slope @ natural))
    torch.testing.assert_close(theta, objective.theta - length * natural, rtol=1e-9, atol=1e-11)
    assert report.kl < 0.01


def test_an_estimated_metric_gives_the_direction_and_the_true_one_the_length() -> None:
    """theta - sqrt(2 max_kl / s'(H + d)s) s with s = (E + d)^-1 g: no step back is needed, though E
    takes the divergence for much smaller."""
    objective = quadratic(estimate=symmetric(torch.linspace(0.1, 2.0, D), seed=8))
    assert objective.estimate is not None
    cheap = TrustRegionSettings(cg_iterations=D, damping=0.5, metric_share=0.25)
    theta, report = trust_region_step(objective, objective.theta, cheap)
    assert (report.accepted, report.backtracks) == (True, 0)
    damping = 0.5 * torch.eye(D, dtype=torch.float64)
    s = torch.linalg.solve(objective.estimate + damping, objective.slope)
    length = math.sqrt(2 * 0.01 / float(s @ (objective.hessian + damping) @ s))
    torch.testing.assert_close(theta, objective.theta - length * s, rtol=1e-9, atol=1e-11)
    assert report.cg_residual < 1e-9


@pytest.mark.parametrize("estimate", [None, symmetric(torch.linspace(0.1, 2.0, D), seed=8)])
def test_momentum_adds_the_direction_of_the_step_before(estimate: Tensor | None) -> None:
    """theta + sqrt(2 max_kl / v'Hv) v with v = .9 e - H^-1 g, by the metric's inverse where it is
    estimated, but the length by H; with no momentum e is not read."""
    objective, earlier = quadratic(estimate=estimate), 0.5 * draw(D, seed=6)
    settings = replace(EXACT, metric_share=1.0 if estimate is None else 0.25)
    heavy = replace(settings, momentum=0.9)
    theta, report = trust_region_step(objective, objective.theta, heavy, earlier)
    metric = objective.hessian if estimate is None else estimate
    direction = 0.9 * earlier - torch.linalg.solve(metric, objective.slope)
    step = math.sqrt(2 * 0.01 / float(direction @ objective.hessian @ direction)) * direction
    assert (report.accepted, report.backtracks) == (True, 0)
    assert report.followed is not None
    torch.testing.assert_close(report.followed, direction, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(theta, objective.theta + step, rtol=1e-7, atol=1e-9)
    # The accepted point is judged by the surrogate itself.
    assert math.isclose(report.surrogate_after, 3.0 + float(objective.slope @ step), rel_tol=1e-7)
    first, begun = trust_region_step(objective, objective.theta, heavy)
    objective.products = 0
    plain, report = trust_region_step(objective, objective.theta, settings, earlier)
    assert torch.equal(first, plain)
    # With the residual no product is needed for the length.
    assert objective.products == (D if estimate is None else 1)
    assert begun.followed is not None
    assert report.followed is not None
    assert torch.equal(begun.followed, report.followed)


def test_a_step_is_as_long_whatever_the_momentum_weighs() -> None:
    """Its direction is kept before its length is found: .5 e and 50 e in the same direction."""
    objective = quadratic()
    natural = -torch.linalg.solve(objective.hessian, objective.slope)
    heavy = replace(EXACT, momentum=0.5)
    near, _ = trust_region_step(objective, objective.theta, heavy, natural)
    far, report = trust_region_step(objective, objective.theta, heavy, 100.0 * natural)
    torch.testing.assert_close(near, far, rtol=1e-7, atol=1e-9)
    assert report.followed is not None
    torch.testing.assert_close(report.followed, 51.0 * natural, rtol=1e-6, atol=1e-9)


def test_momentum_against_the_gradient_is_refused_and_fades() -> None:
    """What was followed points away from where the surrogate falls: theta stays, v' = n + .5 v,
    and as soon as that is on the natural gradient's side the step is taken."""
    objective = quadratic()
    natural = -torch.linalg.solve(objective.hessian, objective.slope)
    heavy = replace(EXACT, momentum=0.5)
    followed, expected = -5.0 * natural, [-1.5, 0.25]
    for share in expected:
        theta, report = trust_region_step(objective, objective.theta, heavy, followed)
        assert report.followed is not None
        followed = report.followed
        torch.testing.assert_close(followed, share * natural, rtol=1e-6, atol=1e-9)
        assert (theta is objective.theta) == (share < 0)
        assert report.refused_because == (Refusal.DID_NOT_FALL if share < 0 else "")


def test_the_residual_is_that_of_the_last_iteration() -> None:
    """|b - A x| / |b| after one iteration: x = (g'g / g'Ag) g."""
    objective = quadratic()
    _, report = trust_region_step(
        objective, objective.theta, TrustRegionSettings(cg_iterations=1, damping=0)
    )
    g, H = objective.slope, objective.hessian
    rest = g - (g @ g) / (g @ H @ g) * (H @ g)
    assert math.isclose(report.cg_residual, float(rest.norm() / g.norm()), rel_tol=1e-9)


def test_steps_back_are_taken_until_the_divergence_is_small_enough() -> None:
    """Divergence 4 times what H says: 4 r^(2n) <= 1 first at n = 4, for .8^3 = .512, .8^4 = .4096.

    The point accepted is theta + .8^4 of the full step, and was the fifth candidate.
    """
    plain, steep = quadratic(), quadratic(scale=4.0)
    full, _ = trust_region_step(plain, plain.theta, EXACT)
    theta, report = trust_region_step(steep, steep.theta, EXACT)
    assert (report.accepted, report.backtracks) == (True, 4)
    torch.testing.assert_close(theta, steep.theta + 0.8**4 * (full - steep.theta))
    assert len(steep.seen) == 1 + 5
    assert report.kl <= 0.01


def test_steps_back_are_taken_until_the_surrogate_falls() -> None:
    """At r of the full step f the surrogate g'x + x'Bx / 2 changes by -r G + r^2 f'Bf / 2, with
    G = -g'f. B = H G / (.7 max_kl) makes that r G (r / .7 - 1): below 0 at .8^2, not at .8."""
    objective = quadratic()
    natural = torch.linalg.solve(objective.hessian, objective.slope)
    gain = math.sqrt(2 * 0.01 * float(objective.slope @ natural))
    curved = quadratic(bend=objective.hessian * gain / (0.7 * 0.01))
    _, report = trust_region_step(curved, curved.theta, EXACT)
    assert (report.accepted, report.backtracks) == (True, 2)
    assert report.surrogate_after < report.surrogate_before == 3.0


def test_an_indefinite_divergence_is_refused() -> None:
    eigenvalues = torch.tensor([-3.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    objective = quadratic(hessian=symmetric(eigenvalues, seed=6))
    check_refused(objective, "curvature not positive")
    assert len(objective.seen) == 1


def test_a_surrogate_that_only_worsens_is_refused_after_all_steps_back() -> None:
    """The gradient lies about the surrogate's sign: 15 candidates, none accepted."""

    class Worsening(Quadratic):
        def gradient(self) -> Tensor:
            return -self.slope

    objective = Worsening(**vars(quadratic()))
    check_refused(objective, "surrogate did not fall", backtracks=15)
    assert len(objective.seen) == 1 + 15
    # They lie at .8^k of the full step.
    steps = [candidate - objective.theta for candidate in objective.seen[1:]]
    for k, step in enumerate(steps):
        torch.testing.assert_close(step, 0.8**k * steps[0], rtol=1e-9, atol=1e-12)


def test_a_divergence_that_stays_too_large_is_refused() -> None:
    """1e6 times what the Hessian says, where .8^14 squared is only 1 / 518."""
    check_refused(quadratic(scale=1e6), "KL too large", backtracks=15)


def test_a_surrogate_that_does_not_change_is_refused() -> None:
    """The surrogate must fall, not stay: in float32 a step below rounding gives the same theta."""
    objective = quadratic()
    objective = quadratic(theta=1e9 + objective.theta.float())
    check_refused(objective, "surrogate did not fall", backtracks=15)


def test_a_gradient_of_0_is_refused() -> None:
    check_refused(quadratic(slope=torch.zeros(D, dtype=torch.float64)), "gradient is zero")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_surrogate_that_is_not_finite_is_refused(bad: float) -> None:
    class Broken(Quadratic):
        def evaluate(self, candidate: Tensor) -> tuple[float, float]:
            return bad, 0.0

    check_refused(Broken(**vars(quadratic())), "surrogate or gradient not finite")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_refused(bad: float) -> None:
    slope = draw(D, seed=2)
    slope[3] = bad

    class Broken(Quadratic):
        def gradient(self) -> Tensor:
            return slope

    report = check_refused(Broken(**vars(quadratic())), "surrogate or gradient not finite")
    assert report.followed is None


@pytest.mark.parametrize(
    ("surrogate", "kl"),
    [(math.nan, 0.0), (math.inf, 0.0), (-1.0, math.nan), (-1.0, math.inf), (math.nan, math.nan)],
)
def test_candidates_that_are_not_finite_are_refused(surrogate: float, kl: float) -> None:
    """NaN compares with nothing, so it can neither fall nor be small enough."""

    class Broken(Quadratic):
        def evaluate(self, candidate: Tensor) -> tuple[float, float]:
            return (3.0, 0.0) if torch.equal(candidate, self.theta) else (surrogate, kl)

    check_refused(Broken(**vars(quadratic())), "surrogate or KL not finite", backtracks=15)


def test_a_product_that_is_not_finite_is_refused() -> None:
    objective = quadratic(hessian=torch.full((D, D), math.nan, dtype=torch.float64))
    check_refused(objective, "Fisher product not finite")


def test_a_candidate_past_which_numbers_break_down_is_stepped_back_from() -> None:
    """NaN at the full step alone: the next is accepted, 1 step back."""

    class Fragile(Quadratic):
        def evaluate(self, candidate: Tensor) -> tuple[float, float]:
            surrogate, kl = super().evaluate(candidate)
            return (math.nan, math.nan) if len(self.seen) == 2 else (surrogate, kl)

    objective = Fragile(**vars(quadratic()))
    _, report = trust_region_step(objective, objective.theta, EXACT)
    assert (report.accepted, report.backtracks) == (True, 1)


def test_parameters_keep_their_type() -> None:
    """theta in float32 is multiplied and moved in float32; the search runs in float64."""
    objective = quadratic(theta=draw(D, seed=1).float())
    theta, report = trust_region_step(objective, objective.theta, EXACT)
    assert report.accepted
    assert theta.dtype == torch.float32
    assert all(candidate.dtype == torch.float32 for candidate in objective.seen)


@given(
    exponents=st.lists(st.floats(-8, 4), min_size=2, max_size=5),
    negative=st.integers(0, 31),
    seed=st.integers(0, 999),
    bend=st.sampled_from([0.0, 1e-3, 1.0, 1e4]),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_what_is_accepted_is_better_and_near_and_all_else_changes_nothing(
    exponents: list[float], negative: int, seed: int, bend: float
) -> None:
    """For H with eigenvalues +-10^k, k in [-8, 4], and any surrogate g'x + x'Bx / 2: the surrogate
    falls and the divergence is at most max_kl, or theta is the same and a reason is given."""
    magnitudes = 10.0 ** torch.tensor(exponents, dtype=torch.float64)
    signs = torch.tensor([-1.0 if negative >> i & 1 else 1.0 for i in range(len(exponents))])
    d = len(exponents)
    objective = Quadratic(
        theta=draw(d, seed),
        slope=draw(d, seed + 1),
        hessian=symmetric(magnitudes * signs, seed + 2),
        bend=bend * symmetric(draw(d, seed + 3), seed + 4),
    )
    before = objective.theta.clone()
    theta, report = trust_region_step(objective, objective.theta, TrustRegionSettings())
    surrogate, kl = objective.evaluate(theta)
    assert torch.equal(objective.theta, before)
    if report.accepted:
        assert surrogate < 3.0
        assert kl <= 0.01
        assert (report.surrogate_after, report.kl) == (surrogate, kl)
    else:
        assert theta is objective.theta
        assert report.refused_because
        assert (report.surrogate_after, report.kl) == (3.0, 0.0)


def test_each_iteration_has_its_trust_region() -> None:
    """The first of them too from which on it is another; and then for good."""
    settings = TrustRegionSettings(
        max_kl=0.02, later_from=(2, 5), later_max_kls=(0.01, 0.03), momentum=0.9
    )
    found = [settings.at(iteration) for iteration in range(7)]
    assert [one.max_kl for one in found] == [0.02, 0.02, 0.01, 0.01, 0.01, 0.03, 0.03]
    assert found[3] == TrustRegionSettings(max_kl=0.01, momentum=0.9)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TrustRegionSettings(max_kl=0.0), "max_kl must be finite and above 0, got 0.0"),
        (
            lambda: TrustRegionSettings(max_kl=math.nan),
            "max_kl must be finite and above 0, got nan",
        ),
        (lambda: TrustRegionSettings(cg_iterations=0), "cg_iterations must be at least 1, got 0"),
        (lambda: TrustRegionSettings(damping=-1.0), "damping must be at least 0, got -1.0"),
        (lambda: TrustRegionSettings(backtracks=0), "backtracks must be at least 1, got 0"),
        (lambda: TrustRegionSettings(backtrack_ratio=1.0), "between 0 and 1, got 1.0"),
        (
            lambda: TrustRegionSettings(later_from=(3,), later_max_kls=(0.0,)),
            "later_max_kls must be finite and above 0, got 0.0",
        ),
        (
            lambda: TrustRegionSettings(later_from=(3, 3), later_max_kls=(0.2, 0.1)),
            "trust_region.later_from must be iterations .* each later than .* got .3, 3.",
        ),
        (
            lambda: TrustRegionSettings(later_from=(3,)),
            "later_max_kls must be one for each of trust_region.later_from, got 0 for 1",
        ),
    ],
)
def test_settings_out_of_range_are_refused(
    make: Callable[[], TrustRegionSettings], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make()
