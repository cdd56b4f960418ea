"""Worlds on the CPU and a policy elsewhere: lanes that change no bit, and what crosses over."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from envs.family import Floats, TaskFamily, Transition, Worlds
from envs.navigation import Navigation2D, NavigationWorlds
from maml_rl.adapt import Params, broadcast
from maml_rl.episodes import Episodes
from maml_rl.policy import LOG_STD, GaussianPolicy, PolicySettings, make_policy
from maml_rl.rollout import ActionError, Divergence, HostRollout, Loop, Wave, log_probs_of
from maml_rl.sampler import Sampler, task_seeds
from maml_rl.seeds import TRAINING
from maml_rl.trained import to_device
from tests.fake_device import FAKE, TO_DEVICE, TO_HOST, fake_device
from tests.test_sampler import (
    FAMILIES,
    SEEDS,
    Count,
    K,
    M,
    Scripted,
    check_same,
    different_params,
    policy_of,
    tasks_of,
)

pytestmark = pytest.mark.usefixtures("one_torch_thread")

SCRIPT = torch.tensor(
    # Ends at step, diverges at step, where the start is below.
    [[0.0, 0.0, 0.0], [4.0, 0.0, 0.0], [0.0, 3.0, 0.7], [2.0, 0.0, 0.0], [0.0, 2.0, 0.6]]
)
"""Five tasks: worlds of tasks 2 and 4 break down in steps 3 and 2, if they start low enough."""

EVERY: dict[str, tuple[TaskFamily, Tensor]] = {
    **{name: (family, tasks_of(family)) for name, family in FAMILIES.items()},
    "scripted": (Scripted(), SCRIPT),
}


def observing(family: TaskFamily) -> GaussianPolicy:
    """A policy that is told its task."""
    inputs = len(family.observation_columns) + len(family.task_columns)
    settings = PolicySettings(layers=(8,), observe_task=True)
    return make_policy(settings, inputs, len(family.action_columns))


def sample(
    family: TaskFamily,
    tasks: Tensor,
    lanes: int | None,
    *,
    policy: GaussianPolicy | None = None,
    count: Count = "episodes",
    at_once: int = M,
    device: str = "cpu",
) -> tuple[Episodes, Divergence | None]:
    """Sample M tasks in so many lanes; the episodes are brought to the CPU."""
    policy = policy or policy_of(family)
    params = to_device(different_params(policy, M), device)
    with Sampler(
        family, policy, tasks=at_once, episodes=K, count=count, threads=1, device=device
    ) as sampler:
        sampler._rollout.close()
        rollout = sampler._rollout = HostRollout(sampler._loop, lanes)
        episodes = sampler.sample(params, tasks, SEEDS)
    found = {name: value.cpu() for name, value in vars(episodes).items()}
    return Episodes(**found), rollout.divergence


def check_same_divergence(one: Divergence | None, other: Divergence | None) -> None:
    if one is None or other is None:
        assert one is other
        return
    for name, value in vars(one).items():
        np.testing.assert_array_equal(value, getattr(other, name), err_msg=name)


@pytest.mark.parametrize("at_once", [M, 3])
@pytest.mark.parametrize("count", ["episodes", "steps"])
@pytest.mark.parametrize("name", EVERY)
def test_lanes_change_no_bit(name: str, count: Count, at_once: int) -> None:
    """Two and three lanes of five tasks (3 + 2, 2 + 2 + 1), and of three, where the last part has
    two (2 and none, 1 + 1 and none), for worlds that end and break down; so does a policy that is
    told its task; and the first breakdown is the same one."""
    family, tasks = EVERY[name]
    for policy in (policy_of(family), observing(family)):
        settings = {"policy": policy, "count": count, "at_once": at_once}
        expected, broken = sample(family, tasks, 1, **settings)  # type: ignore[arg-type]  # of several kinds
        assert (broken is not None) == (name == "scripted")
        for lanes in (2, 3):
            found, divergence = sample(family, tasks, lanes, **settings)  # type: ignore[arg-type]  # likewise
            check_same(expected, found)
            check_same_divergence(broken, divergence)


@pytest.mark.parametrize("name", EVERY)
def test_where_the_policy_is_changes_no_bit(name: str) -> None:
    """On the device, in the two lanes that it has there, as on the CPU."""
    family, tasks = EVERY[name]
    for policy in (policy_of(family), observing(family)):
        expected, broken = sample(family, tasks, None, policy=policy, count="steps", at_once=3)
        with fake_device():
            found, divergence = sample(
                family, tasks, None, policy=policy, count="steps", at_once=3, device=FAKE
            )
        check_same(expected, found)
        check_same_divergence(broken, divergence)


def test_a_policy_that_is_told_its_task_observes_it_last() -> None:
    """In every step of each of its episodes, in any lane."""
    family, tasks = EVERY["scripted"]
    episodes, _ = sample(family, tasks, 2, policy=observing(family))
    told = episodes.observations[..., 2:]
    assert torch.equal(told[episodes.alive], SCRIPT[:, None, None].expand_as(told)[episodes.alive])


@pytest.mark.parametrize("lanes", [1, 2, 3])
@pytest.mark.parametrize("at_once", [M, 3])
def test_the_first_breakdown_is_kept_with_all_that_led_to_it(lanes: int, at_once: int) -> None:
    """Of a part it is task 4's in step 2, wherever it falls in lanes: in the first episode whose
    start is below .6. Where tasks go three at a time task 2's part comes first: step 3, .7."""
    family = Scripted()
    episodes, broken = sample(family, SCRIPT, lanes, at_once=at_once)
    task, step, below = (4, 2, 0.6) if at_once == M else (2, 3, 0.7)
    starts = episodes.observations[task, :, 0, 0]
    slot = int((starts < below).nonzero()[0])
    assert broken is not None
    assert (broken.task_index, broken.task_seed) == (task, SEEDS[task])
    assert broken.episode == slot
    assert broken.task.tolist() == SCRIPT[task].double().tolist()
    assert broken.start == pytest.approx(float(starts[slot]))
    middle, half = torch.tensor([2.0, 0.5, 25.0]), torch.tensor([4.0, 0.5, 15.0])
    controls = middle + half * episodes.actions[task, slot, :step]
    np.testing.assert_allclose(broken.actions, controls.numpy(), rtol=1e-6)


@pytest.mark.parametrize("lanes", [1, 2])
def test_a_later_wave_goes_on_with_the_next_episodes(lanes: int) -> None:
    """After 4 and 7 episodes the wave's first are numbers 4 and 7: they start as those do when 9
    are run from 0 on. A slot that is not wanted holds none; a breakdown has its own number."""
    family = Scripted()
    policy = policy_of(family)
    wave = wave_of(policy, torch.tensor([[0.0, 0.0, 0.0], [0.0, 2.0, 2.0]]))
    loop = Loop(family=family, policy=policy, tasks=2, episodes=9)
    first = HostRollout(loop).run(replace(wave, wanted=torch.tensor([9, 9])))
    rollout = HostRollout(replace(loop, episodes=K), lanes)
    later = replace(wave, taken=torch.tensor([4, 7]), wanted=torch.tensor([3, 2]), offset=10)
    episodes = rollout.run(later)
    found = episodes.observations[:, :, 0, 0]
    assert episodes.alive.sum(2).tolist() == [[6, 6, 6], [1, 1, 0]]
    assert episodes.diverged.tolist() == [[False] * 3, [True, True, False]]
    starts = first.observations[:, :, 0, 0]
    assert torch.equal(found[0], starts[0, 4:7])
    assert torch.equal(found[1, :2], starts[1, 7:])
    broken = rollout.divergence
    assert broken is not None
    assert (broken.task_index, broken.episode) == (11, 7)
    assert broken.start == pytest.approx(float(starts[1, 7]))


@pytest.mark.parametrize("lanes", [1, 2, 3])
@pytest.mark.parametrize("at_once", [4, 3])
def test_an_action_that_is_not_finite_names_its_task_in_any_lane(lanes: int, at_once: int) -> None:
    """Task 3 of 4: of the last lane, or alone in the second part."""
    family = FAMILIES["navigation"]
    policy = policy_of(family)
    params = different_params(policy, 4)
    params["mean.1.bias"][3, 1] = torch.nan
    with Sampler(family, policy, tasks=at_once, episodes=K) as sampler:
        sampler._rollout = HostRollout(sampler._loop, lanes)
        with pytest.raises(ActionError, match=rf"task 3 \(seed {SEEDS[3]}\), control step 0"):
            sampler.sample(params, tasks_of(family, 4), SEEDS[:4])


def test_an_action_that_is_not_finite_later_names_its_step() -> None:
    """The second lane's gives infinity when it sees four steps taken."""
    family = Scripted()
    policy = make_policy(PolicySettings(layers=()), 2, 3)
    params = different_params(policy, 3)
    # The second number that it sees is the steps taken; float32 ends at 3.4e38.
    params["mean.0.weight"][2] = torch.tensor([[0.0, 0.0, 0.0], [0.0, 1e38, 0.0]])
    with Sampler(family, policy, tasks=3, episodes=K) as sampler:
        sampler._rollout = HostRollout(sampler._loop, 2)
        with pytest.raises(ActionError, match=rf"task 2 \(seed {SEEDS[2]}\), control step 4"):
            sampler.sample(params, torch.zeros(3, 3), SEEDS[:3])


def test_an_action_is_the_mean_and_the_episodes_own_noise() -> None:
    """(action - mean) / std of step t is row t of what NumPy's Philox, with the task's seed and the
    episode's index for its key, draws after the start."""
    family = Scripted()
    policy = policy_of(family)
    params = different_params(policy, M)
    episodes, _ = sample(family, torch.zeros(M, 3), 2)
    means = policy.network.of_tasks(params, episodes.observations.flatten(1, 2))
    std = torch.exp(params[LOG_STD])[:, None, None]
    noise = (episodes.actions - means.reshape(M, K, 6, 3)) / std
    for task in range(M):
        for slot in range(K):
            key = np.array([SEEDS[task], slot], np.uint64)
            rng = np.random.Generator(np.random.Philox(key=key))
            start = rng.uniform(size=1)
            assert float(episodes.observations[task, slot, 0, 0]) == np.float32(start[0])
            drawn = torch.from_numpy(rng.standard_normal((6, 3), np.float32))
            torch.testing.assert_close(noise[task, slot], drawn, rtol=1e-4, atol=1e-4)


# The order in which lanes go.


@dataclass(frozen=True, kw_only=True)
class Logged(Navigation2D):
    """Points that write down what is done with them, and with how many."""

    goal_radius: float = 0.0
    log: list[str] = field(default_factory=list)

    def make_worlds(self, count: int, *, threads: int = 0) -> Worlds:
        return LoggedWorlds(self, count)


class LoggedWorlds(NavigationWorlds):
    def reset(self, tasks: Tensor, starts: Floats | Tensor, where: Tensor | None = None) -> Tensor:
        assert isinstance(self.family, Logged)
        self.family.log.append(f"reset {self.count}")
        return super().reset(tasks, starts, where)

    def step(self, actions: Tensor, where: Tensor | None = None) -> Transition:
        assert isinstance(self.family, Logged)
        self.family.log.append(f"step {self.count}")
        return super().step(actions, where)

    def close(self) -> None:
        assert isinstance(self.family, Logged)
        self.family.log.append(f"close {self.count}")


@dataclass(frozen=True)
class LoggedNetwork:
    """Means of 0, and how many rows were asked for."""

    log: list[str]

    def initial_parameters(self, generator: torch.Generator) -> Params:
        return {}

    def __call__(self, params: Params, observations: Tensor) -> Tensor:
        self.log.append(f"policy {observations.shape[:-1].numel()}")
        return torch.zeros_like(observations)

    def of_tasks(self, params: Params, observations: Tensor) -> Tensor:
        return self(params, observations)


def wave_of(policy: GaussianPolicy, tasks: Tensor, device: str = "cpu") -> Wave:
    """The first K episodes of each task."""
    count = len(tasks)
    return Wave(
        params=to_device(broadcast(policy.initial_parameters(0), count), device),
        tasks=tasks,
        seeds=task_seeds(TRAINING, 0, 0, 0, count),
        taken=torch.zeros(count, dtype=torch.int64),
        wanted=torch.full((count,), K),
        offset=0,
    )


def test_while_the_policy_serves_one_lane_the_other_is_stepped() -> None:
    """Three tasks of two episodes, lanes of 4 worlds and of 2: what one has asked for is waited for
    only when the other has been stepped and has asked too."""
    family = Logged(horizon=3)
    policy = GaussianPolicy(LoggedNetwork(family.log), 2)
    rollout = HostRollout(Loop(family=family, policy=policy, tasks=3, episodes=2), 2)
    wave = replace(wave_of(policy, torch.ones(3, 2)), wanted=torch.full((3,), 2))
    episodes = rollout.run(wave)
    rollout.close()
    assert episodes.alive.all()
    both = ["step 4", "policy 4", "step 2", "policy 2"]
    begin = ["reset 4", "policy 4", "reset 2", "policy 2"]
    assert family.log == [*begin, *both, *both, "step 4", "step 2", "close 4", "close 2"]


def lanes_of(loop: Loop) -> list[int]:
    """Tasks of each lane."""
    rollout = HostRollout(loop)
    rollout.close()
    return [size for size, _ in rollout._lanes]


def test_how_many_lanes_there_are() -> None:
    """One on the CPU, two where the policy is elsewhere, but of no more tasks than there are; what
    is watched must be all together."""
    family = FAMILIES["navigation"]
    loop = Loop(family=family, policy=policy_of(family), tasks=5, episodes=K)
    assert lanes_of(loop) == [5]
    assert lanes_of(replace(loop, device=FAKE)) == [3, 2]
    assert lanes_of(replace(loop, device="cuda")) == [3, 2]
    assert lanes_of(replace(loop, device="cuda", tasks=1)) == [1]
    assert lanes_of(replace(loop, device="cuda", watch=lambda *_: None)) == [5]
    worlds = [worlds.count for _, worlds in HostRollout(loop, 3)._lanes]
    assert worlds == [2 * K, 2 * K, K]


def test_a_watch_sees_every_world_in_every_step() -> None:
    """With the policy on the device: N worlds after the reset and each of H steps."""
    family = Navigation2D(horizon=4, goal_radius=0.0)
    policy = policy_of(family)
    seen: list[tuple[int, bool, int]] = []

    def watch(worlds: Worlds, transition: Transition | None, now: Tensor) -> None:
        assert now.device.type == "cpu"
        seen.append((worlds.count, transition is None, int(now.sum())))

    with fake_device():
        loop = Loop(family=family, policy=policy, tasks=3, episodes=K, device=FAKE, watch=watch)
        HostRollout(loop).run(wave_of(policy, torch.ones(3, 2), FAKE))
    assert seen == [(3 * K, first, 3 * K) for first in (True, False, False, False, False)]


# What crosses over.


def crossings(horizon: int, tasks: int, *, observe: bool = False) -> tuple[Counter[object], int]:
    """What one rollout on the device copies, and how often it waits."""
    family = Navigation2D(horizon=horizon, goal_radius=0.0)
    policy = observing(family) if observe else policy_of(family)
    with fake_device() as kept:
        rollout = HostRollout(
            Loop(family=family, policy=policy, tasks=tasks, episodes=K, device=FAKE)
        )
        wave = wave_of(policy, torch.ones(tasks, 2), FAKE)
        kept.clear()
        episodes = rollout.run(wave)
        found = Counter[object](kept.crossings)
        waits = len(kept.waits)
        assert {value.device.type for value in vars(episodes).values()} == {FAKE}
    return found, waits


@pytest.mark.parametrize("observe", [False, True])
@pytest.mark.parametrize("horizon", [3, 8])
def test_a_control_step_takes_one_copy_each_way_for_each_lane(horizon: int, observe: bool) -> None:
    """Lanes of 2 tasks and 1, K = 3 episodes, observations of 2 (and the task of 2), actions of 2:
    those, and for a rollout its noise, its five records and the parameters; nothing is waited for
    that was not copied."""
    seen, A, layer = 4 if observe else 2, 2, 8
    expected = Counter[object]()
    for tasks in (2, 1):
        expected[TO_DEVICE, tasks * K * seen] += horizon
        expected[TO_HOST, tasks * K * A] += horizon
    steps = 3 * K * horizon
    # Noise; log-probabilities, rewards, alive and the one measure; which diverged.
    expected.update([(TO_DEVICE, steps * A), *[(TO_DEVICE, steps)] * 4, (TO_DEVICE, 3 * K)])
    sizes = (seen * layer, layer, layer * A, A, A)
    expected.update((TO_HOST, 3 * size) for size in sizes)
    assert crossings(horizon, 3, observe=observe) == (expected, 0)


def test_a_sampler_copies_nothing_more_for_longer_episodes() -> None:
    """Ten steps more are ten copies each way for each of two lanes, and nothing is waited for."""

    def events(horizon: int) -> tuple[int, int]:
        family = Navigation2D(horizon=horizon, goal_radius=0.0)
        policy = policy_of(family)
        params = to_device(different_params(policy, M), FAKE)
        with Sampler(family, policy, tasks=M, episodes=K, device=FAKE) as sampler:
            kept.clear()
            sampler.sample(params, tasks_of(family), SEEDS)
        return len(kept.crossings), len(kept.waits)

    with fake_device() as kept:
        (short, waits), (long, more_waits) = events(3), events(13)
    assert long - short == 10 * 2 * 2
    assert more_waits == waits


def test_log_probs_of_noise_are_those_of_the_actions() -> None:
    """log N(mean + std noise; mean, std), against torch.distributions; below the least std too."""
    noise = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    logs = torch.linspace(-1.0, 1.0, 10).reshape(2, 5)
    logs[1, 2] = -40.0
    std = torch.exp(logs.clamp(min=np.log(1e-6)))[:, None, None]
    normal = torch.distributions.Normal(0.0, std)
    expected = normal.log_prob(std * noise).sum(-1)  # type: ignore[no-untyped-call]  # torch's
    torch.testing.assert_close(log_probs_of(noise, {LOG_STD: logs}), expected)
