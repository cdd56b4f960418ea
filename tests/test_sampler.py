"""The loop between policy and worlds: bits that no split changes, and worlds that misbehave."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from envs.ant import AntVel
from envs.family import Column, Floats, TaskFamily, Transition, Worlds, as_mask
from envs.half_cheetah import HalfCheetahVel
from envs.navigation import Navigation2D
from maml_rl.adapt import Params, broadcast
from maml_rl.chunks import torch_threads
from maml_rl.episodes import Episodes
from maml_rl.policy import LOG_STD, GaussianPolicy, PolicySettings, make_policy
from maml_rl.rollout import HostRollout, SamplingError, Seeds
from maml_rl.sampler import (
    Sampler,
    SamplingSettings,
    task_generator,
    task_seeds,
)
from maml_rl.seeds import TEST, TRAINING

Count = Literal["episodes", "steps"]

M, K = 5, 3

FAMILIES: dict[str, TaskFamily] = {
    "navigation": Navigation2D(horizon=7, goal_radius=0.08),
    "half_cheetah_vel": HalfCheetahVel(horizon=6),
    # Heights between which an ant stays for 2 to 9 steps.
    "ant_vel": AntVel(horizon=9, z_low=0.5, z_high=0.58),
}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> TaskFamily:
    return FAMILIES[request.param]


pytestmark = pytest.mark.usefixtures("one_torch_thread")


def policy_of(family: TaskFamily) -> GaussianPolicy:
    return make_policy(
        PolicySettings(layers=(8,)), len(family.observation_columns), len(family.action_columns)
    )


def different_params(policy: GaussianPolicy, tasks: int) -> Params:
    """Each task's own parameters and noise: log std -.3 + .1 task + .05 action."""
    each = [policy.initial_parameters(seed) for seed in range(tasks)]
    params = {name: torch.stack([p[name] for p in each]) for name in each[0]}
    params[LOG_STD] += -0.3 + 0.1 * torch.arange(tasks).unsqueeze(1)
    params[LOG_STD] += 0.05 * torch.arange(policy.action_size)
    return params


def tasks_of(family: TaskFamily, count: int = M) -> Tensor:
    return torch.from_numpy(family.sample_tasks(count, np.random.default_rng(1)))


SEEDS = task_seeds(TRAINING, 2, 3, 0, M)


def sample(
    family: TaskFamily,
    *,
    rows: slice = slice(0, M),
    at_once: int = M,
    count: Count = "episodes",
    threads: int = 1,
    action_scale: float = 1.0,
) -> Episodes:
    """Sample tasks `rows`, `at_once` of them together."""
    policy = policy_of(family)
    params = {name: p[rows] for name, p in different_params(policy, M).items()}
    with Sampler(
        family,
        policy,
        tasks=at_once,
        episodes=K,
        count=count,
        threads=threads,
        action_scale=action_scale,
    ) as sampler:
        return sampler.sample(params, tasks_of(family)[rows], SEEDS[rows])


def check_same(one: Episodes, other: Episodes) -> None:
    """The same bits in every live step; what one has more of are slots without an episode."""
    shared = min(one.alive.shape[1], other.alive.shape[1])
    for longer in (one, other):
        assert not longer.alive[:, shared:].any()
        assert not longer.diverged[:, shared:].any()
    a, b = ({n: v[:, :shared] for n, v in vars(e).items()} for e in (one, other))
    assert torch.equal(a["alive"], b["alive"])
    assert torch.equal(a["diverged"], b["diverged"])
    for name in ("observations", "actions", "rewards", "log_probs", "measures"):
        assert torch.equal(a[name][a["alive"]], b[name][b["alive"]]), name


def rows_of(episodes: Episodes, rows: slice) -> Episodes:
    return Episodes(**{name: values[rows] for name, values in vars(episodes).items()})


@pytest.mark.parametrize("count", ["episodes", "steps"])
def test_tasks_together_are_the_tasks_one_by_one(family: TaskFamily, count: Count) -> None:
    """M tasks in lockstep give, bit for bit, what M calls with one task give."""
    together = sample(family, count=count)
    assert together.observations.shape[0] == M
    for task in range(M):
        rows = slice(task, task + 1)
        check_same(rows_of(together, rows), sample(family, rows=rows, at_once=1, count=count))


@pytest.mark.parametrize("count", ["episodes", "steps"])
@pytest.mark.parametrize("at_once", [1, 2, 3, 8])
def test_how_tasks_are_split_over_worlds_and_threads_changes_no_bit(
    family: TaskFamily, at_once: int, count: Count
) -> None:
    """Chunks of 1, 2 (5 = 2 + 2 + 1), 3 and more worlds than tasks; 1 and 2 threads of physics."""
    expected = sample(family, count=count)
    for threads in (1, 2):
        check_same(expected, sample(family, at_once=at_once, threads=threads, count=count))
        with torch_threads(2):
            check_same(expected, sample(family, at_once=at_once, threads=threads, count=count))


def test_a_sampler_used_before_samples_as_a_new_one_does(family: TaskFamily) -> None:
    """No state of the worlds is left from one call to the next."""
    policy, tasks = policy_of(family), tasks_of(family)
    params = different_params(policy, M)
    with Sampler(family, policy, tasks=M, episodes=K, threads=1) as sampler:
        first = sampler.sample(params, tasks, SEEDS)
        other = sampler.sample(params, tasks.flip(0), SEEDS + np.uint64(1))
        assert not torch.equal(first.actions, other.actions)
        check_same(first, sampler.sample(params, tasks, SEEDS))


@pytest.mark.parametrize("count", ["episodes", "steps"])
def test_alive_is_a_prefix_and_log_probs_are_the_policys(family: TaskFamily, count: Count) -> None:
    """alive never rises within an episode; stored log pi is log N(a; mean(o), std) recomputed."""
    episodes = sample(family, count=count)
    assert not (~episodes.alive[:, :, :-1] & episodes.alive[:, :, 1:]).any()
    policy = policy_of(family)
    params = different_params(policy, M)
    for task in range(M):
        live = episodes.alive[task]
        own = {name: p[task] for name, p in params.items()}
        expected = policy.log_prob(
            own, episodes.observations[task][live], episodes.actions[task][live]
        )
        torch.testing.assert_close(episodes.log_probs[task][live], expected, rtol=1e-4, atol=1e-4)
    assert torch.isfinite(episodes.observations[episodes.alive]).all()
    assert not episodes.diverged.any()


@pytest.mark.parametrize("at_once", [2, M])
def test_batches_counted_in_steps_hold_enough_and_stop_in_time(at_once: int) -> None:
    """Ants that fall after 2 to 9 steps: every task has at least K H live steps in whole episodes,
    and had too few before its last wave of at most K episodes."""
    family = FAMILIES["ant_vel"]
    H = family.episode_steps
    episodes = sample(family, count="steps", at_once=at_once)
    lengths = episodes.alive.sum(2)
    assert len(set(lengths[lengths > 0].tolist())) > 2
    assert (episodes.live_steps >= K * H).all()
    # No slot is kept that no task used, and each task's episodes come first.
    assert (lengths[:, -1] > 0).any()
    for row in lengths:
        used = row[row > 0]
        assert len(used) > 2 * K
        assert torch.equal(row[: len(used)], used)
        assert int(used[:-K].sum()) < K * H
    # The first wave is the batch that is counted in episodes.
    plain = sample(family, at_once=at_once)
    first = {name: values[:, :K] for name, values in vars(episodes).items()}
    check_same(Episodes(**first), plain)


def test_without_early_ends_both_ways_to_count_are_one() -> None:
    """K episodes of H steps are K H steps: one wave."""
    family = FAMILIES["half_cheetah_vel"]
    episodes = sample(family, count="steps")
    assert episodes.alive.shape == (M, K, family.episode_steps)
    assert episodes.alive.all()


def constant_policy(family: TaskFamily, action: float) -> tuple[GaussianPolicy, Params]:
    """Always the same action, but for noise of e^-13."""
    policy = make_policy(
        PolicySettings(layers=(), initial_log_std=-13.0),
        len(family.observation_columns),
        len(family.action_columns),
    )
    theta = policy.initial_parameters(0)
    theta["mean.0.weight"].zero_()
    theta["mean.0.bias"].fill_(action)
    return policy, theta


@pytest.mark.parametrize(
    ("action", "action_scale", "move"),
    [(1.0, 1.0, 0.1), (-0.5, 1.0, -0.05), (7.0, 1.0, 0.1), (10.0, 10.0, 0.1), (1.0, 10.0, 0.01)],
)
def test_the_policys_action_of_action_scale_is_the_bound(
    action: float, action_scale: float, move: float
) -> None:
    """Navigation's bound is .1 m: an action of 1 moves so far, more is clipped by the body alone,
    and with action_scale 10 an action of 10 does. Episodes keep the action as it was drawn."""
    family = Navigation2D(horizon=3, goal_radius=0.0)
    policy, theta = constant_policy(family, action)
    with Sampler(family, policy, tasks=2, episodes=K, action_scale=action_scale) as sampler:
        episodes = sampler.sample(broadcast(theta, 2), tasks_of(family, 2), SEEDS[:2])
    expected = move * torch.tensor([0.0, 1.0, 2.0])[:, None].expand(2, K, 3, 2)
    torch.testing.assert_close(episodes.observations, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        episodes.actions, torch.full((2, K, 3, 2), action), rtol=0, atol=1e-4
    )


def test_rewards_and_measures_are_those_of_the_step_just_taken() -> None:
    """From the origin by .1 m a step in both: distance to the goal after the move, and it ends
    within the radius; the step that ends it is alive and rewarded."""
    family = Navigation2D(horizon=5)
    policy, theta = constant_policy(family, 1.0)
    goals = torch.tensor([[0.2, 0.2], [0.4, -0.3]])
    with Sampler(family, policy, tasks=2, episodes=1) as sampler:
        episodes = sampler.sample(broadcast(theta, 2), goals, SEEDS[:2])
    assert episodes.alive[:, 0].sum(1).tolist() == [2, 5]
    for task, length in ((0, 2), (1, 5)):
        steps = 0.1 * torch.arange(1.0, length + 1)[:, None] * torch.ones(2)
        distance = (steps - goals[task]).norm(dim=1)
        torch.testing.assert_close(
            episodes.rewards[task, 0, :length], -distance, rtol=1e-4, atol=1e-4
        )
        torch.testing.assert_close(
            episodes.measures[task, 0, :length, 0], distance, rtol=1e-4, atol=1e-4
        )


@dataclass(frozen=True, kw_only=True)
class Scripted(TaskFamily):
    """Worlds that do as their task says; steps count from 1. Bounds differ and are not centred.

    Task: step at which the episode ends (0: never), step at which a world diverges (0: never),
    and below which start, drawn from U[0, 1], it does.
    """

    horizon: int | None = 6

    name: ClassVar[str] = "scripted"
    task_columns: ClassVar[tuple[Column, ...]] = (
        Column("ends", "1"),
        Column("diverges", "1"),
        Column("below", "1"),
    )
    measure_columns: ClassVar[tuple[Column, ...]] = (Column("step", "1"),)

    @property
    def observation_columns(self) -> tuple[Column, ...]:
        return Column("start", "1"), Column("steps_taken", "1")

    @property
    def action_columns(self) -> tuple[Column, ...]:
        return tuple(Column(name, "1") for name in "abc")

    @property
    def action_bounds(self) -> tuple[Floats, Floats]:
        return np.array([-2.0, 0.0, 10.0]), np.array([6.0, 1.0, 40.0])

    def sample_tasks(self, count: int, rng: np.random.Generator) -> npt.NDArray[np.float32]:
        return np.zeros((count, 3), np.float32)

    def draw_start(self, rng: np.random.Generator) -> Floats:
        return rng.uniform(size=1)

    def make_worlds(self, count: int, *, threads: int = 0) -> Worlds:
        return ScriptedWorlds(count)


class ScriptedWorlds(Worlds):
    """What a diverged world says is NaN, and a world that is over must not be stepped."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.tasks = torch.zeros(count, 3)
        self.starts = torch.zeros(count)
        self.taken = torch.zeros(count)
        self.over = torch.zeros(count, dtype=torch.bool)
        self.controls: list[Tensor] = []

    def observe(self) -> Tensor:
        return torch.stack([self.starts, self.taken], 1)

    def reset(self, tasks: Tensor, starts: Floats, where: Tensor | None = None) -> Tensor:
        mask = as_mask(where, self.count)
        self.tasks[mask] = tasks[mask]
        self.starts[mask] = torch.from_numpy(starts).float()[mask, 0]
        self.taken[mask] = 0.0
        self.over[mask] = False
        return self.observe()

    def step(self, actions: Tensor, where: Tensor | None = None) -> Transition:
        mask = as_mask(where, self.count)
        assert not (mask & self.over).any()
        self.controls.append(actions.clone())
        self.taken[mask] += 1.0
        ends, diverges, below = self.tasks.T
        diverged = mask & (self.taken == diverges) & (self.starts < below)
        terminated = mask & (self.taken == ends)
        self.over |= diverged | terminated
        bad = torch.where(self.over & (self.taken == diverges), torch.nan, 0.0)
        return Transition(
            observations=self.observe() + bad[:, None],
            rewards=10.0 * self.taken + bad,
            terminated=terminated,
            diverged=diverged,
            measures=self.taken[:, None] + bad[:, None],
        )


def run_script(
    tasks: list[list[float]], *, count: Count = "episodes", at_once: int = 4, episodes: int = K
) -> Episodes:
    family = Scripted()
    policy = policy_of(family)
    wanted = torch.tensor(tasks)
    with Sampler(family, policy, tasks=at_once, episodes=episodes, count=count) as sampler:
        seeds = task_seeds(TRAINING, 0, 0, 0, len(tasks))
        return sampler.sample(broadcast(policy.initial_parameters(0), len(tasks)), wanted, seeds)


def test_the_step_that_ends_an_episode_is_alive() -> None:
    """An end at step 1, 4, 6 = H or never: 1, 4, 6 and 6 live steps, each rewarded 10 t."""
    episodes = run_script([[1.0, 0.0, 0.0], [4.0, 0.0, 0.0], [6.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    assert episodes.alive.sum(2).tolist() == [[n] * K for n in (1, 4, 6, 6)]
    for task, n in enumerate((1, 4, 6, 6)):
        steps = torch.arange(n) + 1.0
        assert torch.equal(episodes.rewards[task, :, :n], (10 * steps).expand(K, n))
        assert torch.equal(episodes.measures[task, :, :n, 0], steps.expand(K, n))
        # An observation is from before its step.
        assert torch.equal(episodes.observations[task, :, :n, 1], (steps - 1).expand(K, n))


def test_an_episode_ends_before_the_step_in_which_its_world_diverges() -> None:
    """At step 4 where the start is below .5: 3 live steps, counted as diverged, nothing NaN in
    them; the other worlds, of this task too, go on to the end as if nothing had been."""
    K = 8
    calm = run_script([[0.0, 0.0, 0.0]] * 3, episodes=K)
    episodes = run_script([[0.0, 0.0, 0.0], [0.0, 4.0, 0.5], [5.0, 0.0, 0.0]], episodes=K)
    below = calm.observations[1, :, 0, 0] < 0.5
    assert 0 < below.sum() < K
    expected = torch.tensor([[6] * K, [3 if b else 6 for b in below], [5] * K])
    assert torch.equal(episodes.alive.sum(2), expected)
    assert torch.equal(episodes.diverged[1], below)
    assert not episodes.diverged[[0, 2]].any()
    alive = episodes.alive
    for name in ("observations", "actions", "rewards", "log_probs", "measures"):
        ours, theirs = getattr(episodes, name)[alive], getattr(calm, name)[alive]
        assert torch.equal(ours, theirs), name
    torch.testing.assert_close(episodes.returns()[1, below], torch.full((int(below.sum()),), 60.0))


def test_a_world_that_ends_and_diverges_at_once_has_diverged() -> None:
    """The step does not count, whatever else it says."""
    episodes = run_script([[4.0, 4.0, 2.0]])
    assert episodes.alive.sum(2).tolist() == [[3] * K]
    assert episodes.diverged.all()


@pytest.mark.parametrize("at_once", [1, 2, 4])
def test_a_task_whose_worlds_all_diverge_at_once_is_named(at_once: int) -> None:
    """Task 2 of 3, wherever it falls in the batches: the error says which task and which seed."""
    seed = task_seeds(TRAINING, 0, 0, 0, 3)[2]
    with pytest.raises(SamplingError, match=rf"task 2 \(seed {seed}\).* diverged at the first"):
        run_script([[0.0, 0.0, 0.0], [0.0, 4.0, 2.0], [0.0, 1.0, 2.0]], at_once=at_once)


def test_one_world_that_diverges_at_once_is_an_episode_of_no_steps() -> None:
    """Its return is NaN and left out of the mean; the other worlds' count."""
    K = 8
    episodes = run_script([[0.0, 1.0, 0.5]], episodes=K)
    gone = episodes.diverged[0]
    assert 0 < gone.sum() < K
    assert torch.equal(episodes.alive.sum(2)[0], torch.where(gone, 0, 6))
    assert torch.equal(episodes.returns()[0].isnan(), gone)
    assert episodes.mean_returns().tolist() == [10.0 * 21]


def test_a_wave_that_diverges_whole_is_made_up_for_by_the_next() -> None:
    """Seven of ten worlds diverge at once, the others last 2 steps: waves after the first may hold
    no live step, and sampling goes on until there are K H = 18."""
    episodes = run_script([[2.0, 1.0, 0.7]], count="steps")
    lengths = episodes.alive.sum(2)[0]
    assert set(lengths.tolist()) == {0, 2}
    assert K * 6 <= int(lengths.sum()) < K * 6 + 2 * K
    began = (lengths > 0) | episodes.diverged[0]
    lost = began.reshape(-1, K).any(1) & ~(lengths > 0).reshape(-1, K).any(1)
    assert lost.any()
    assert torch.equal(lengths == 2, began & ~episodes.diverged[0])


def test_waves_are_sized_from_the_mean_length() -> None:
    """K H = 18 steps. Ends at 2: 9 episodes, exactly; ends at 4: 5 (20 steps), the last wave of 2;
    never: 3. The tasks that have enough wait without episodes."""
    tasks = [[2.0, 0.0, 0.0], [4.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    episodes = run_script(tasks, count="steps")
    assert episodes.alive.sum(2).tolist() == [[2] * 9, [4] * 5 + [0] * 4, [6] * 3 + [0] * 6]
    # Episodes of later waves are new ones: all starts differ.
    starts = episodes.observations[0, :, 0, 0]
    assert len(set(starts.tolist())) == 9
    # Joined from parts, tasks that needed fewer waves get empty slots.
    check_same(episodes, run_script(tasks, count="steps", at_once=2))


@pytest.mark.parametrize("action_scale", [1.0, 4.0])
def test_actions_are_mapped_from_minus_1_and_1_to_the_bounds(action_scale: float) -> None:
    """control = (low + high) / 2 + (high - low) / 2 a / action_scale, unclipped, per dimension."""
    family = Scripted()
    policy = policy_of(family)
    sampler = Sampler(family, policy, tasks=2, episodes=K, action_scale=action_scale)
    tasks, theta = torch.zeros(2, 3), policy.initial_parameters(0)
    episodes = sampler.sample(broadcast(theta, 2), tasks, task_seeds(TRAINING, 0, 0, 0, 2))
    assert isinstance(sampler._rollout, HostRollout)
    ((_, worlds),) = sampler._rollout._lanes
    assert isinstance(worlds, ScriptedWorlds)
    controls = torch.stack(worlds.controls, 1).reshape(2, K, 6, 3)
    middle, half = torch.tensor([2.0, 0.5, 25.0]), torch.tensor([4.0, 0.5, 15.0])
    torch.testing.assert_close(controls, middle + half * episodes.actions / action_scale)
    assert (episodes.actions.abs() > 1).any()
    sampler.close()


@pytest.mark.parametrize("at_once", [1, 2, 4])
def test_an_action_that_is_not_finite_is_refused(at_once: int) -> None:
    """The task and its seed are named, wherever it falls in the batches, and the control step."""
    family = FAMILIES["navigation"]
    policy = policy_of(family)
    params = different_params(policy, 4)
    params["mean.1.bias"][3, 1] = torch.nan
    with (
        Sampler(family, policy, tasks=at_once, episodes=K) as sampler,
        pytest.raises(SamplingError, match=rf"task 3 \(seed {SEEDS[3]}\), control step 0"),
    ):
        sampler.sample(params, tasks_of(family, 4), SEEDS[:4])


def test_an_infinite_log_std_is_refused() -> None:
    family = FAMILIES["navigation"]
    policy = policy_of(family)
    theta = policy.initial_parameters(0) | {LOG_STD: torch.tensor([0.0, torch.inf])}
    with (
        Sampler(family, policy, tasks=1, episodes=K) as sampler,
        pytest.raises(SamplingError, match="not finite"),
    ):
        sampler.sample(broadcast(theta, 1), tasks_of(family, 1), SEEDS[:1])


def test_seeds_differ_in_everything_they_are_made_from() -> None:
    """(stream, run seed, iteration, phase, task): 2 x 3 x 4 x 3 x 5 seeds, no two alike, so the
    test's stream shares none with training's; nor do the generators that draw tasks."""
    found: list[int] = []
    for stream, seed, iteration, phase in itertools.product(
        (TRAINING, TEST), (0, 1, 1703_03400), range(4), range(3)
    ):
        found += task_seeds(stream, seed, iteration, phase, 5).tolist()
    assert len(set(found)) == len(found) == 2 * 3 * 4 * 3 * 5
    drawn = [
        int(task_generator(stream, seed, iteration).integers(2**63))
        for stream, seed, iteration in itertools.product((TRAINING, TEST), range(3), range(4))
    ]
    assert len(set(drawn)) == len(drawn)


def test_a_tasks_seed_does_not_depend_on_how_many_there_are() -> None:
    few, many = (task_seeds(TRAINING, 7, 1, 2, n) for n in (2, 6))
    assert few.dtype == np.uint64
    assert few.tolist() == many[:2].tolist()


def test_every_bit_of_a_seed_counts() -> None:
    """Seeds above 2^63 that differ by 1 draw other noise; so do two episodes of one seed."""
    family = FAMILIES["half_cheetah_vel"]
    policy = policy_of(family)
    theta = policy.initial_parameters(0)
    seeds: Seeds = np.array([2**63 + 1, 2**63 + 2, 2**63 + 1], np.uint64)
    tasks = tasks_of(family, 1).expand(3, 1)
    with Sampler(family, policy, tasks=3, episodes=K) as sampler:
        episodes = sampler.sample(broadcast(theta, 3), tasks, seeds)
    assert torch.equal(episodes.actions[0], episodes.actions[2])
    draws = torch.cat([episodes.actions[0, :, 0], episodes.actions[1, :, 0]])
    starts = torch.cat([episodes.observations[0, :, 0], episodes.observations[1, :, 0]])
    for values in (draws, starts):
        assert len(set(map(tuple, values.tolist()))) == 2 * K


def test_torch_threads_are_put_back() -> None:
    before = torch.get_num_threads()

    def fail() -> None:
        with torch_threads(2):
            assert torch.get_num_threads() == 2
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tasks": 0}, "sampling.tasks must be at least 1, got 0"),
        ({"episodes": 0}, "sampling.episodes must be at least 1, got 0"),
        ({"tasks_at_once": -1}, "sampling.tasks_at_once must be at least 0, got -1"),
    ],
)
def test_settings_out_of_range_are_refused(fields: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingSettings(**fields)  # type: ignore[arg-type]  # numbers, but not of every field
