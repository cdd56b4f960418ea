"""One meta-iteration, on bandits that need no simulator."""

from __future__ import annotations

import itertools
import math
import os
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import jacrev

from envs.navigation import Navigation2D
from maml_rl.adapt import Params, broadcast, flatten, unflatten
from maml_rl.advantages import AdvantageSettings, estimate_advantages
from maml_rl.chunks import Chunks, join_tasks, of_tasks
from maml_rl.curvature import InnerStep
from maml_rl.episodes import Episodes, Steps, pack
from maml_rl.losses import INNER_LOSSES
from maml_rl.maml import AdaptationSettings, Collect, MetaObjective, MetaReport, meta_iteration
from maml_rl.policy import LOG_STD, GaussianPolicy, PolicySettings, make_policy
from maml_rl.sampler import Sampler, task_generator, task_seeds
from maml_rl.seeds import TRAINING
from maml_rl.trust_region import TrustRegionSettings

M, E, H, O, A = 3, 4, 5, 2, 1  # noqa: E741  # the page's letter
POISON = 99.0

GOALS = torch.tensor([-1.0, 0.5, 2.0])
UNEVEN = ((5, 2, 4, 1), (3, 0, 5, 2), (5, 5, 5, 5))
EVEN = ((5, 2, 4, 1), (3, 0, 5, 4), (1, 1, 5, 5))
"""12 live steps a task, however they are divided."""


pytestmark = pytest.mark.usefixtures("one_torch_thread")


def bandit(
    policy: GaussianPolicy,
    seed: int,
    *,
    lengths: tuple[tuple[int, ...], ...] = UNEVEN,
    reward: Callable[[Tensor, Tensor], Tensor] = lambda actions, goals: -(actions - goals).abs(),
    seen: list[tuple[Params, int]] | None = None,
) -> Collect:
    """Random observations; the reward is minus how far the action is from the task's goal."""

    def collect(params: Params, phase: int) -> Episodes:
        if seen is not None:
            seen.append((params, phase))
        kind = params[LOG_STD].dtype
        rng = torch.Generator().manual_seed(1000 * seed + phase)
        alive = torch.arange(H) < torch.tensor(lengths).unsqueeze(-1)
        observations = torch.randn(M, E, H, O, generator=rng).to(kind)
        noise = torch.randn(M, E, H, A, generator=rng).to(kind)
        means = policy.network.of_tasks(params, observations.flatten(1, 2)).reshape(M, E, H, A)
        std = torch.exp(params[LOG_STD])[:, None, None]
        actions = means + std * noise
        log_probs = (-0.5 * noise**2 - torch.log(std) - 0.5 * math.log(2 * math.pi)).sum(-1)

        def live(values: Tensor) -> Tensor:
            mask = alive.reshape(M, E, H, *[1] * (values.ndim - 3))
            return torch.where(mask, values, POISON)

        return Episodes(
            observations=live(observations),
            actions=live(actions),
            rewards=live(reward(actions[..., 0], GOALS[:, None, None])),
            alive=alive,
            log_probs=live(log_probs),
            measures=live(actions),
            diverged=torch.zeros(M, E, dtype=torch.bool),
        )

    return collect


POLICY = make_policy(PolicySettings(layers=(6,)), O, A)


def iterate(
    theta: Params,
    collect: Collect,
    *,
    adaptation: AdaptationSettings,
    policy: GaussianPolicy = POLICY,
    trust_region: TrustRegionSettings | None = None,
    threads: int = 1,
    size: int = 1,
) -> tuple[Params, MetaReport]:
    """One meta-iteration with the usual settings and a clock that counts its readings."""
    chunks = Chunks(threads, size)
    ticks = itertools.count()
    try:
        return meta_iteration(
            theta,
            policy,
            collect,
            M,
            adaptation=adaptation,
            advantages=AdvantageSettings(),
            trust_region=trust_region or TrustRegionSettings(),
            chunks=chunks,
            clock=lambda: float(next(ticks)),
        )
    finally:
        chunks.close()


def equal(one: Params, other: Params) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one) and set(one) == set(other)


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("loss", INNER_LOSSES)
@pytest.mark.parametrize("inner_steps", [0, 1, 2])
def test_an_iteration_steps_within_the_trust_region(
    inner_steps: int, loss: str, first_order: bool
) -> None:
    """For 0, 1 and 2 inner steps, every loss and both orders: n + 1 batches, the surrogate falls,
    KL <= max_kl, theta changes and the old one is left alone; clock: 1 tick a batch."""
    theta = POLICY.initial_parameters(1)
    before = {name: p.clone() for name, p in theta.items()}
    new, report = iterate(
        theta,
        bandit(POLICY, 2),
        adaptation=AdaptationSettings(
            inner_steps=inner_steps,
            inner_loss=loss,  # type: ignore[arg-type]  # one of three
            first_order=first_order,
        ),
    )
    assert len(report.episodes) == len(report.batches) == inner_steps + 1
    assert report.step.accepted, report.step.refused_because
    assert report.step.surrogate_after < report.step.surrogate_before
    assert 0 < report.step.kl <= TrustRegionSettings().max_kl
    assert equal(theta, before)
    assert {n: p.shape for n, p in new.items()} == {n: p.shape for n, p in theta.items()}
    assert all(not torch.equal(new[name], theta[name]) for name in theta)
    assert report.seconds_sampling == inner_steps + 1


@pytest.mark.parametrize("loss", ["log-prob", "dice"])
def test_the_same_seed_gives_the_same_bits(loss: str) -> None:
    """Twice in one process, and on 1, 2 and 3 threads; another seed gives another theta."""
    adaptation = AdaptationSettings(inner_steps=2, inner_loss=loss)  # type: ignore[arg-type]  # one of three
    theta = POLICY.initial_parameters(1)
    one, report = iterate(theta, bandit(POLICY, 3), adaptation=adaptation)
    for threads in (1, 2, 3):
        two, again = iterate(theta, bandit(POLICY, 3), adaptation=adaptation, threads=threads)
        assert equal(one, two)
        assert again.step == report.step
    other, _ = iterate(theta, bandit(POLICY, 4), adaptation=adaptation)
    assert not equal(one, other)


def test_chunks_of_any_size_give_the_same_step() -> None:
    """Up to rounding: 1, 2 (of 3 tasks) and all at once."""
    adaptation = AdaptationSettings(inner_steps=1)
    theta = {name: p.double() for name, p in POLICY.initial_parameters(1).items()}
    one, _ = iterate(theta, bandit(POLICY, 3), adaptation=adaptation)
    for size in (2, 0):
        two, _ = iterate(theta, bandit(POLICY, 3), adaptation=adaptation, size=size)
        # Advantages are float32, and their last bit may follow the number of slots in a chunk.
        torch.testing.assert_close(flatten(one), flatten(two), rtol=1e-3, atol=1e-5)


def test_each_phase_samples_with_what_the_last_adapted() -> None:
    """Phase 0: theta for all. Phase k: theta_k = theta_k-1 - alpha grad L(theta_k-1), here by plain
    autograd, a task at a time, of -mean over live steps of log pi A."""
    theta = {name: p.double() for name, p in POLICY.initial_parameters(5).items()}
    seen: list[tuple[Params, int]] = []
    _, report = iterate(
        theta,
        bandit(POLICY, 6, seen=seen),
        adaptation=AdaptationSettings(inner_steps=2, step_size=0.3),
    )
    assert [phase for _, phase in seen] == [0, 1, 2]
    assert equal(seen[0][0], broadcast(theta, M))
    for phase in (0, 1):
        episodes = report.episodes[phase]
        advantages, _ = estimate_advantages(episodes, AdvantageSettings())
        for task in range(M):
            live = episodes.alive[task]
            own = {n: p[task].clone().requires_grad_() for n, p in seen[phase][0].items()}
            log_probs = POLICY.log_prob(
                own, episodes.observations[task][live], episodes.actions[task][live]
            )
            loss = -(log_probs * advantages[task][live]).mean()
            for (name, p), g in zip(
                own.items(), torch.autograd.grad(loss, list(own.values())), strict=True
            ):
                expected = (p - 0.3 * g).detach()
                torch.testing.assert_close(
                    seen[phase + 1][0][name][task], expected, rtol=1e-6, atol=1e-7
                )


@pytest.mark.parametrize(
    ("settings", "flat", "reason"),
    [
        # Too short a step to change a float32.
        (TrustRegionSettings(max_kl=1e-30), False, "surrogate did not fall"),
        # Rewards all 0: no advantages, no gradient.
        (TrustRegionSettings(), True, "gradient is zero"),
    ],
)
@pytest.mark.parametrize("inner_steps", [0, 1])
def test_a_refused_step_returns_the_very_same_theta(
    settings: TrustRegionSettings, flat: bool, reason: str, inner_steps: int
) -> None:
    """The object itself, its tensors untouched, and the reason."""
    theta = POLICY.initial_parameters(7)
    before = {name: p.clone() for name, p in theta.items()}
    collect = bandit(POLICY, 8, reward=lambda a, g: torch.zeros_like(a)) if flat else None
    new, report = iterate(
        theta,
        collect or bandit(POLICY, 8),
        adaptation=AdaptationSettings(inner_steps=inner_steps),
        trust_region=settings,
    )
    assert new is theta
    assert equal(theta, before)
    assert (report.step.refused_because, report.step.kl) == (reason, 0.0)


LINEAR = make_policy(PolicySettings(layers=()), O, A)


class PooledTrpo:
    """TRPO on the live steps of all tasks in one pile (Schulman et al. 2015), in a dozen lines."""

    def __init__(self, theta: Params, episodes: Episodes) -> None:
        advantages, _ = estimate_advantages(episodes, AdvantageSettings())
        live = episodes.alive
        self.o, self.a = episodes.observations[live], episodes.actions[live]
        self.advantages, self.old = advantages[live].double(), episodes.log_probs[live]
        self.like, self.theta = theta, flatten(theta)
        self.old_mean, self.old_s = (t.detach() for t in self.outputs(self.theta))

    def outputs(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        params = unflatten(vector, self.like)
        return self.o @ params["mean.0.weight"] + params["mean.0.bias"], params[LOG_STD]

    def surrogate(self, vector: Tensor) -> Tensor:
        mean, s = self.outputs(vector)
        log_probs = -0.5 * ((self.a - mean) / s.exp()) ** 2 - s - 0.5 * math.log(2 * math.pi)
        return -((log_probs.sum(1) - self.old).exp() * self.advantages).mean()

    def kl(self, vector: Tensor) -> Tensor:
        mean, s = self.outputs(vector)
        apart = (2 * self.old_s).exp() + (self.old_mean - mean) ** 2
        return (s - self.old_s + apart / (2 * (2 * s).exp()) - 0.5).sum(1).mean()

    def step(self, settings: TrustRegionSettings) -> tuple[Tensor, int]:
        g = jacrev(self.surrogate)(self.theta)
        F = jacrev(jacrev(self.kl))(self.theta) + settings.damping * torch.eye(len(g))
        natural = torch.linalg.solve(F, -g)
        full = math.sqrt(2 * settings.max_kl / float(-g @ natural)) * natural
        for k in range(settings.backtracks):
            candidate = self.theta + settings.backtrack_ratio**k * full
            better = self.surrogate(candidate) < self.surrogate(self.theta)
            if better and self.kl(candidate) <= settings.max_kl:
                return candidate, k
        raise AssertionError("no step")


@pytest.mark.parametrize("max_kl", [0.01, 1.0])
def test_without_inner_steps_it_is_trpo_on_the_pooled_tasks(max_kl: float) -> None:
    """With as many live steps in every task a mean of means is the mean: gradient, direction and
    line search are those of one pile of steps. d = 4, so conjugate gradient is exact."""
    theta = {name: p.double() for name, p in LINEAR.initial_parameters(9).items()}
    settings = TrustRegionSettings(max_kl=max_kl, cg_iterations=20)
    new, report = iterate(
        theta,
        bandit(LINEAR, 10, lengths=EVEN),
        adaptation=AdaptationSettings(inner_steps=0),
        policy=LINEAR,
        trust_region=settings,
    )
    trpo = PooledTrpo(theta, report.episodes[0])
    expected, backtracks = trpo.step(settings)
    torch.testing.assert_close(flatten(new), expected, rtol=1e-6, atol=1e-8)
    assert report.step.backtracks == backtracks
    assert (max_kl < 1.0) or backtracks > 0
    before = float(trpo.surrogate(trpo.theta))
    assert math.isclose(report.step.surrogate_before, before, abs_tol=1e-7)
    assert math.isclose(report.step.kl, float(trpo.kl(expected)), rel_tol=1e-5)

    estimated, _ = estimate_advantages(report.episodes[0], AdvantageSettings())
    outer = pack(report.episodes[0], estimated)
    inner = InnerStep(LINEAR, INNER_LOSSES["log-prob"], 0.1, False)
    chunks = Chunks(1, 1)
    objective = MetaObjective(inner, [broadcast(theta, M)], [], outer, chunks)
    gradient = objective.gradient()
    chunks.close()
    torch.testing.assert_close(gradient, jacrev(trpo.surrogate)(trpo.theta), rtol=1e-6, atol=1e-8)


def test_tasks_count_alike_in_the_surrogate_and_by_their_steps_in_the_kl() -> None:
    """Surrogate: mean of task means. KL: mean over live steps pooled. Tasks of 1, 2 and 5 steps
    that all observe o = 1, 2 and 3; the mean goes from 0 to o / 2, so a step's KL is o^2 / 8."""
    theta = {
        "mean.0.weight": torch.zeros(1, 1),
        "mean.0.bias": torch.zeros(1),
        LOG_STD: torch.zeros(1),
    }
    policy = make_policy(PolicySettings(layers=()), 1, 1)
    alive = torch.arange(5) < torch.tensor([1, 2, 5])[:, None]
    o = torch.where(alive, torch.tensor([1.0, 2.0, 3.0])[:, None], POISON).unsqueeze(-1)
    outer = Steps(
        observations=o,
        actions=o,
        advantages=torch.where(alive, torch.tensor([1.0, -2.0, 4.0])[:, None], POISON),
        log_probs=torch.where(alive, -0.5 * o[..., 0] ** 2 - 0.5 * math.log(2 * math.pi), POISON),
        weights=alive / alive.sum(1, keepdim=True),
        first=torch.zeros(3, 5, dtype=torch.int64),
    )
    chunks = Chunks(1, 1)
    inner = InnerStep(policy, INNER_LOSSES["log-prob"], 0.1, False)
    objective = MetaObjective(inner, [broadcast(theta, 3)], [], outer, chunks)
    surrogate, divergence = objective.evaluate(torch.tensor([0.5, 0.0, 0.0]))
    chunks.close()
    # a = o, so log pi rises from -o^2 / 2 to -o^2 / 8.
    ratios = [math.exp(0.375 * x) for x in (1, 4, 9)]
    expected = -(1 * ratios[0] - 2 * ratios[1] + 4 * ratios[2]) / 3
    assert math.isclose(surrogate, expected, rel_tol=1e-5)
    assert math.isclose(divergence, 0.125 * (1 * 1 + 2 * 4 + 5 * 9) / 8, rel_tol=1e-5)


def test_meta_training_learns_to_adapt() -> None:
    """Goals -1, .5 and 2 cannot be told apart by what is observed. After 25 iterations one gradient
    step brings the mean distance from the goal well below what no single action could reach."""
    policy = make_policy(PolicySettings(layers=(), initial_log_std=-0.5), O, A)
    theta = policy.initial_parameters(11)
    full = ((H,) * E,) * M
    distances = []
    for iteration in range(25):
        theta, report = iterate(
            theta,
            bandit(policy, 100 + iteration, lengths=full),
            adaptation=AdaptationSettings(inner_steps=1, step_size=0.5),
            policy=policy,
            trust_region=TrustRegionSettings(max_kl=0.03),
        )
        distances.append([-float(e.mean_returns().mean()) / H for e in report.episodes])
    # The best single action is .5: distances 1.5, 0, 1.5.
    before, after = np.mean(distances[-5:], axis=0)
    assert before > 0.95
    assert after < 0.8 * before
    assert after < np.mean(distances[:3], axis=0)[1]


def resident_megabytes() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.slow
def test_memory_does_not_grow_from_iteration_to_iteration() -> None:
    """20 iterations of navigation after a warm-up of 5: the process grows by less than 8 MB, where
    keeping the episodes of every one would take 13 MB."""
    family = Navigation2D(horizon=50)
    policy = make_policy(PolicySettings(layers=(16,)), 2, 2)
    theta, tasks, K = policy.initial_parameters(12), 4, 60
    chunks = Chunks(2)
    with Sampler(family, policy, tasks=tasks, episodes=K) as sampler:
        for iteration in range(25):
            if iteration == 5:
                before = resident_megabytes()
            drawn = family.sample_tasks(tasks, task_generator(TRAINING, 0, iteration))
            where = torch.from_numpy(drawn)

            def collect(
                params: Params, phase: int, where: Tensor = where, iteration: int = iteration
            ) -> Episodes:
                return sampler.sample(params, where, task_seeds(TRAINING, 0, iteration, phase, 4))

            theta, report = meta_iteration(
                theta,
                policy,
                collect,
                tasks,
                adaptation=AdaptationSettings(),
                advantages=AdvantageSettings(),
                trust_region=TrustRegionSettings(cg_iterations=2, backtracks=2),
                chunks=chunks,
                clock=lambda: 0.0,
            )
    size = sum(t.numel() * t.element_size() for e in report.episodes for t in vars(e).values())
    chunks.close()
    assert 20 * size > 13e6
    assert resident_megabytes() - before < 8.0


def test_chunks_keep_the_order_of_tasks() -> None:
    """7 tasks by 3 are (0, 3), (3, 6), (6, 7), whichever thread ends first; size 0 is all."""
    chunks = Chunks(threads=2, size=3)
    wait = threading.Event()

    def slow_first(start: int, stop: int) -> tuple[int, int]:
        if start == 0:
            assert wait.wait(10)
        else:
            wait.set()
        assert torch.get_num_threads() == 1
        return start, stop

    assert chunks.map(slow_first, 7) == [(0, 3), (3, 6), (6, 7)]
    chunks.close()
    everything = Chunks(threads=1, size=0)
    assert everything.map(lambda start, stop: (start, stop), 7) == [(0, 7)]
    everything.close()
    default = Chunks()
    assert default.threads == len(os.sched_getaffinity(0))
    default.close()


def test_an_error_in_a_chunk_is_raised() -> None:
    chunks = Chunks(threads=2)

    def fail(start: int, stop: int) -> int:
        if start == 1:
            raise RuntimeError("task 1")
        return start

    with pytest.raises(RuntimeError, match="task 1"):
        chunks.map(fail, 3)
    chunks.close()


def test_tasks_are_cut_and_joined_again() -> None:
    params = broadcast(POLICY.initial_parameters(0), 5)
    params = {
        name: p + torch.arange(5.0).reshape(5, *[1] * (p.ndim - 1)) for name, p in params.items()
    }
    parts = [of_tasks(params, 0, 2), of_tasks(params, 2, 3), of_tasks(params, 3, 5)]
    assert equal(join_tasks(parts), params)
    assert equal(parts[1], {name: p[[2]] for name, p in params.items()})


def test_each_iteration_has_its_alpha() -> None:
    """The first of them too from which on it is another; and then for good."""
    settings = AdaptationSettings(
        step_size=0.3, later_from=(2, 5), later_step_sizes=(0.1, 0.2), inner_loss="dice"
    )
    quiet = {"log_std": torch.tensor([-2.0, -3.0])}
    found = [settings.at(iteration, quiet) for iteration in range(7)]
    assert [one.step_size for one in found] == [0.3, 0.3, 0.1, 0.1, 0.1, 0.2, 0.2]
    assert found[3] == AdaptationSettings(step_size=0.1, inner_loss="dice")


@pytest.mark.parametrize(
    ("log_stds", "variance"),
    [
        ([0.0, 0.0], 1.0),
        ([math.log(0.2), math.log(0.5)], 0.1),
        # As the policy acts: not below a standard deviation of 1e-6.
        ([-1000.0, -1000.0], 1e-12),
    ],
)
def test_alpha_may_go_with_the_variance_of_the_noise(
    log_stds: list[float], variance: float
) -> None:
    """Geometric mean over actions, times what is set for the iteration; then it is a number."""
    theta = {"log_std": torch.tensor(log_stds, requires_grad=True)}
    settings = AdaptationSettings(
        step_size=0.3, later_from=(2,), later_step_sizes=(0.4,), times_variance=True
    )
    for iteration, size in ((0, 0.3), (1, 0.3), (2, 0.4)):
        assert settings.size_at(iteration) == size
        found = settings.at(iteration, theta)
        assert found.step_size == pytest.approx(size * variance, rel=1e-6)
        assert found == AdaptationSettings(step_size=found.step_size)
    assert settings.with_alpha(0.2) == AdaptationSettings(step_size=0.2)


def test_an_alpha_that_goes_with_the_noise_stays_in_its_range() -> None:
    """What noise becomes is no setting that could be refused; exp(400) is no float."""
    for size, log_std, alpha in (
        (0.3, 10.0, 1e6),
        (0.3, 400.0, 1e6),
        (5e-324, -1000.0, 5e-324),
    ):
        settings = AdaptationSettings(step_size=size, times_variance=True)
        assert settings.at(0, {"log_std": torch.tensor([log_std])}).step_size == alpha


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AdaptationSettings(inner_steps=-1), "inner_steps must be at least 0, got -1"),
        (
            lambda: AdaptationSettings(step_size=0.0),
            "step_size must be finite and above 0, got 0.0",
        ),
        (
            lambda: AdaptationSettings(step_size=math.inf),
            "step_size must be finite and above 0, got inf",
        ),
        (
            lambda: AdaptationSettings(step_size=math.nan),
            "step_size must be finite and above 0, got nan",
        ),
        (lambda: AdaptationSettings(step_size=2e6), "step_size must be at most 1e.06, got 2000000"),
        (
            lambda: AdaptationSettings(later_from=(3,), later_step_sizes=(0.0,)),
            "later_step_sizes must be finite and above 0, got 0.0",
        ),
        (
            lambda: AdaptationSettings(later_from=(3, 3), later_step_sizes=(0.2, 0.1)),
            "each later than the one before, got .3, 3.",
        ),
        (lambda: AdaptationSettings(later_from=(0,), later_step_sizes=(0.1,)), "from 1 to"),
        (
            lambda: AdaptationSettings(later_from=(3, 4), later_step_sizes=(0.1,)),
            "later_step_sizes must be one for each of adaptation.later_from, got 1 for 2",
        ),
    ],
)
def test_settings_out_of_range_are_refused(
    make: Callable[[], AdaptationSettings], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make()
