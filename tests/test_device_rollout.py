"""Episodes that never leave a device: the loop of worlds on the CPU, to the same bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import mujoco
import numpy as np
import pytest
import torch
from torch import Tensor

from envs.ant import AntDir, AntVel
from envs.family import DeviceWorlds, Draws, Floats, TaskFamily, Transition, WarpSettings
from envs.half_cheetah import HalfCheetahDir, HalfCheetahVel
from envs.locomotion import LocomotionFamily, LocomotionWorlds
from envs.navigation import Navigation2D, NavigationWorlds
from maml_rl.adapt import Params, broadcast
from maml_rl.config import Experiment
from maml_rl.device_rollout import DeviceRollout
from maml_rl.devices import Device, reproducible
from maml_rl.episodes import Episodes
from maml_rl.errors import RunWarning
from maml_rl.noise import EpisodeDraws
from maml_rl.policy import LOG_STD, GaussianPolicy, PolicySettings, make_policy
from maml_rl.replay import play
from maml_rl.rollout import ActionError, Divergence, HostRollout, Loop, Rollout, SamplingError, Wave
from maml_rl.sampler import Sampler, task_seeds
from maml_rl.seeds import TRAINING
from maml_rl.trained import to_device
from tests.fake_device import FAKE, CaptureError, captured, fake_device, rehearsed
from tests.test_rollout import SCRIPT, check_same_divergence, observing
from tests.test_sampler import (
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

NAVIGATION = Navigation2D(horizon=7, goal_radius=0.08)


# Worlds on a device.


@dataclass(frozen=True, kw_only=True)
class ScriptedThere(Scripted):
    """`Scripted`, whose worlds may be on a device; as a graph, a step is rehearsed and replayed."""

    graph: bool = False
    lacking: tuple[str, ...] = ()
    """What `trouble` says, one after the other."""

    def draw_starts(self, draws: Draws) -> Tensor:
        return draws.uniform(1)

    def make_device_worlds(
        self, count: int, *, device: str | torch.device, settings: WarpSettings
    ) -> DeviceWorlds:
        return ScriptedDeviceWorlds(self, count, device)


class ScriptedDeviceWorlds:
    """As `ScriptedWorlds`, with nothing that looks at what a mask says before they are closed."""

    def __init__(self, family: ScriptedThere, count: int, device: str | torch.device) -> None:
        self.family = family
        self.count = count
        self.tasks = torch.zeros(count, 3, device=device)
        self.starts = torch.zeros(count, device=device)
        self.taken = torch.zeros(count, device=device)
        self.over = torch.ones(count, dtype=torch.bool, device=device)
        self.stepped_late = torch.zeros(count, dtype=torch.bool, device=device)
        self.device = self.taken.device
        self.lacking = list(family.lacking)
        self.closed = False

    def observe(self) -> Tensor:
        return torch.stack([self.starts, self.taken], 1)

    def _mask(self, where: Tensor | None) -> Tensor:
        return torch.ones_like(self.over) if where is None else where

    def reset(self, tasks: Tensor, starts: Tensor, where: Tensor | None = None) -> Tensor:
        where = self._mask(where)
        self.tasks.copy_(torch.where(where[:, None], tasks, self.tasks))
        self.starts.copy_(torch.where(where, starts[:, 0], self.starts))
        self.taken.masked_fill_(where, 0.0)
        self.over.copy_(~where)
        return self.observe()

    def step(self, actions: Tensor, where: Tensor | None = None) -> Transition:
        assert actions.device == self.device
        where = self._mask(where)
        self.stepped_late.logical_or_(where & self.over)
        self.taken.add_(where)
        ends, diverges, below = self.tasks.T
        breaks = (self.taken == diverges) & (self.starts < below)
        self.over.logical_or_(breaks | (self.taken == ends))
        bad = torch.where(breaks, torch.nan, 0.0)
        return Transition(
            observations=self.observe() + bad[:, None],
            rewards=10.0 * self.taken + bad,
            # Whatever they say of worlds that were not stepped must not be heard.
            terminated=(self.taken == ends) | ~where,
            diverged=breaks | ~where,
            measures=self.taken[:, None] + bad[:, None],
        )

    def state(self, world: int) -> Mapping[str, Floats]:
        return {}

    def trouble(self) -> str:
        return self.lacking.pop(0) if self.lacking else ""

    def as_graph(self, body: Callable[[], None]) -> Callable[[], None]:
        return rehearsed(body) if self.family.graph else body

    def close(self) -> None:
        assert not self.stepped_late.any(), "worlds that were over were stepped"
        self.closed = True


@dataclass(frozen=True, kw_only=True)
class Graphed(Navigation2D):
    """Points whose control step is captured."""

    def make_device_worlds(
        self, count: int, *, device: str | torch.device, settings: WarpSettings
    ) -> DeviceWorlds:
        return GraphedWorlds(self, count, device)


class GraphedWorlds(NavigationWorlds):
    def as_graph(self, body: Callable[[], None]) -> Callable[[], None]:
        return rehearsed(body)


class SameDraws(HostRollout):
    """Worlds on the CPU, with what the device draws."""

    def _draw(self, wave: Wave) -> tuple[Floats, Tensor]:
        tasks, slots, H = len(wave.tasks), self._loop.episodes, self._loop.family.episode_steps
        indices = (wave.taken[:, None] + torch.arange(slots)).flatten()
        draws = EpisodeDraws(wave.seeds.repeat(slots), indices, "cpu")
        starts = self._loop.family.draw_starts(draws).double().numpy()
        noise = draws.normal(H * self._loop.policy.action_size).reshape(tasks, slots, H, -1)
        if self._loop.deterministic:
            noise.zero_()
        return starts.reshape(tasks, slots, -1), noise


def sample(
    kind: Callable[[Loop], Rollout],
    family: TaskFamily,
    tasks: Tensor,
    *,
    policy: GaussianPolicy | None = None,
    count: Count = "episodes",
    at_once: int = M,
    device: str = "cpu",
    deterministic: bool = False,
) -> tuple[Episodes, Divergence | None]:
    """Sample all tasks; the episodes are brought to the CPU."""
    policy = policy or policy_of(family)
    params = to_device(different_params(policy, len(tasks)), device)
    with Sampler(
        family,
        policy,
        tasks=at_once,
        episodes=K,
        count=count,
        device=device,
        deterministic=deterministic,
    ) as sampler:
        rollout = sampler._rollout = kind(sampler._loop)
        episodes = sampler.sample(params, tasks, SEEDS[: len(tasks)])
    found = {name: value.cpu() for name, value in vars(episodes).items()}
    return Episodes(**found), rollout.divergence


FAMILIES: dict[str, tuple[TaskFamily, Tensor]] = {
    "navigation": (NAVIGATION, tasks_of(NAVIGATION)),
    "scripted": (ScriptedThere(), SCRIPT),
    # Rehearsals longer than an episode.
    "one step": (ScriptedThere(horizon=1, graph=True), SCRIPT),
    "two steps": (ScriptedThere(horizon=2, graph=True), SCRIPT),
    "captured": (ScriptedThere(graph=True), SCRIPT),
    "navigation, captured": (
        Graphed(horizon=7, goal_radius=0.08),
        tasks_of(NAVIGATION),
    ),
}


@pytest.mark.parametrize("count", ["episodes", "steps"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_loop_is_that_of_worlds_on_the_cpu(name: str, count: Count) -> None:
    """With the same starts and noise the same bits come out, whatever ends, breaks down or is
    captured, for all tasks at once and for three at a time, then two; likewise if the policy is
    told its task or takes its mean action, and on the device."""
    family, tasks = FAMILIES[name]
    settings: list[dict[str, object]] = [
        {},
        {"at_once": 3},
        {"policy": observing(family)},
        {"deterministic": True},
    ]
    for one in settings:
        expected, broken = sample(SameDraws, family, tasks, count=count, **one)  # type: ignore[arg-type]  # of several kinds
        found, divergence = sample(DeviceRollout, family, tasks, count=count, **one)  # type: ignore[arg-type]  # likewise
        check_same(expected, found)
        check_same_divergence(broken, divergence)
        with fake_device():
            there, fallen = sample(
                DeviceRollout,
                family,
                tasks,
                count=count,
                device=FAKE,
                **one,  # type: ignore[arg-type]  # likewise
            )
        check_same(expected, there)
        check_same_divergence(broken, fallen)


@pytest.mark.parametrize("at_once", [1, 2, 3, 8])
@pytest.mark.parametrize("name", ["navigation, captured", "captured"])
def test_how_tasks_are_split_changes_no_bit(name: str, at_once: int) -> None:
    """1 to 8 of five tasks at a time: the last part has fewer, or all have."""
    family, tasks = FAMILIES[name]
    for count in ("episodes", "steps"):
        expected, _ = sample(DeviceRollout, family, tasks, count=count)
        found, _ = sample(DeviceRollout, family, tasks, count=count, at_once=at_once)
        check_same(expected, found)


def test_points_move_as_their_actions_say() -> None:
    """By hand: from the origin by each action, times .1 m, at most .1 m along an axis; minus the
    distance to the goal is the reward and the distance the measure; the step that gets within the
    radius of it is the last. log pi is the policy's."""
    policy, tasks = policy_of(NAVIGATION), tasks_of(NAVIGATION)
    # Some goals are so near that they are reached.
    tasks = tasks * torch.tensor([1.0, 0.3, 0.3, 0.2, 0.2])[:, None]
    params = different_params(policy, M)
    episodes, _ = sample(DeviceRollout, NAVIGATION, tasks)
    lengths = set()
    for task in range(M):
        for slot in range(K):
            at = torch.zeros(2)
            for step in range(7):
                assert episodes.alive[task, slot, step]
                own = (task, slot, step)
                torch.testing.assert_close(episodes.observations[own], at)
                at = at + (0.1 * episodes.actions[own]).clamp(-0.1, 0.1)
                offset = at - tasks[task]
                distance = offset.square().sum().sqrt()
                torch.testing.assert_close(episodes.rewards[own], -distance)
                torch.testing.assert_close(episodes.measures[own], distance[None])
                mean = policy.network(
                    {n: p[task] for n, p in params.items()}, episodes.observations[own][None]
                )
                std = torch.exp(params[LOG_STD][task])
                normal = torch.distributions.Normal(mean[0], std)
                expected = normal.log_prob(episodes.actions[own]).sum()  # type: ignore[no-untyped-call]  # torch's
                torch.testing.assert_close(episodes.log_probs[own], expected, rtol=1e-4, atol=1e-4)
                if (offset.abs() < 0.08).all():
                    break
            assert not episodes.alive[task, slot, step + 1 :].any()
            lengths.add(step + 1)
    assert len(lengths) > 2
    assert not episodes.diverged.any()


def test_an_action_is_the_mean_and_the_episodes_own_noise() -> None:
    """(action - mean) / std is what a stream of the task's seed and the episode's index draws after
    the start: number t A + a for action a of step t; and the start is what it draws first."""
    family = ScriptedThere()
    episodes, _ = sample(DeviceRollout, family, torch.zeros(M, 3))
    policy = policy_of(family)
    params = different_params(policy, M)
    means = policy.network.of_tasks(params, episodes.observations.flatten(1, 2))
    std = torch.exp(params[LOG_STD])[:, None, None]
    noise = (episodes.actions - means.reshape(M, K, 6, 3)) / std
    for task in range(M):
        for slot in range(K):
            draws = EpisodeDraws(SEEDS[task : task + 1], torch.tensor([slot]), "cpu")
            assert torch.equal(draws.uniform(1)[0, 0], episodes.observations[task, slot, 0, 0])
            torch.testing.assert_close(
                noise[task, slot], draws.normal(18).reshape(6, 3), rtol=1e-4, atol=1e-4
            )


def test_the_mean_action_is_taken_where_it_is_asked_for() -> None:
    """Actions are the means exactly, and two tasks of the same goal and parameters do the same."""
    policy = policy_of(NAVIGATION)
    params = broadcast(policy.initial_parameters(0), 2)
    loop = Loop(family=NAVIGATION, policy=policy, tasks=2, episodes=K, deterministic=True)
    rollout = DeviceRollout(loop)
    episodes = rollout.run(wave_of(params, torch.full((2, 2), 0.4)))
    live = episodes.alive[0]
    assert torch.equal(episodes.actions[0][live], episodes.actions[1][live])
    means = policy.network.of_tasks(params, episodes.observations.flatten(1, 2))
    means = means.reshape(episodes.actions.shape)
    torch.testing.assert_close(episodes.actions[0][live], means[0][live])
    # log N at the mean: -log std - log(2 pi) / 2 for each of two actions.
    expected = torch.full((int(live.sum()),), -float(np.log(2 * np.pi)))
    torch.testing.assert_close(episodes.log_probs[0][live], expected)


def wave_of(params: Params, tasks: Tensor, *, taken: int = 0, wanted: int = K) -> Wave:
    """The next episodes of each task, whose seeds are SEEDS."""
    count = len(tasks)
    return Wave(
        params,
        tasks,
        SEEDS[:count],
        torch.full((count,), taken),
        torch.full((count,), wanted),
        0,
    )


def test_slots_that_are_not_wanted_are_dead_from_the_first_step() -> None:
    """Of 3 slots 0, 2 and 3 are wanted: no step of the others is alive, and none has diverged,
    though each would in its first step; and what is wanted is the same whatever else is."""
    family = ScriptedThere(graph=True)
    policy = policy_of(family)
    params = different_params(policy, 3)
    rollout = DeviceRollout(Loop(family=family, policy=policy, tasks=3, episodes=K))
    wave = replace(wave_of(params, torch.zeros(3, 3)), wanted=torch.tensor([0, 2, 3]))
    whole, part = rollout.run(wave_of(params, torch.zeros(3, 3))), rollout.run(wave)
    assert part.alive.sum(2).tolist() == [[0, 0, 0], [6, 6, 0], [6, 6, 6]]
    for name in ("observations", "actions", "rewards", "log_probs", "measures"):
        ours, theirs = getattr(part, name)[part.alive], getattr(whole, name)[part.alive]
        assert torch.equal(ours, theirs), name
    broken = rollout.run(replace(wave, tasks=torch.tensor([[0.0, 1.0, 2.0]] * 3)))
    assert not broken.alive.any()
    assert broken.diverged.tolist() == [[False] * 3, [True, True, False], [True] * 3]


def test_an_episode_is_the_same_whichever_wave_it_is_of() -> None:
    """Episodes 0 to 4, as 3 and 2 of the same task: number 3 is the first of the later wave."""
    family = ScriptedThere(graph=True)
    policy = policy_of(family)
    params, tasks = different_params(policy, 2), torch.tensor([[0.0] * 3, [4.0, 0.0, 0.0]])
    rollout = DeviceRollout(Loop(family=family, policy=policy, tasks=2, episodes=5))
    whole = rollout.run(wave_of(params, tasks, wanted=5))
    first = rollout.run(wave_of(params, tasks, wanted=3))
    later = rollout.run(wave_of(params, tasks, taken=3, wanted=2))
    for name in ("observations", "actions", "rewards", "log_probs", "measures", "alive"):
        value = getattr(whole, name)
        assert torch.equal(getattr(first, name)[:, :3], value[:, :3]), name
        assert torch.equal(getattr(later, name)[:, :2], value[:, 3:]), name
    starts = whole.observations[:, :, 0, 0]
    assert len(set(starts.flatten().tolist())) == 10


def test_a_rollout_used_before_runs_as_a_new_one_does() -> None:
    """With other parameters, noise, tasks and seeds in between, and with fewer tasks, whose worlds
    and policies are then those of before; nothing is left of them."""
    family = ScriptedThere(graph=True)
    policy = policy_of(family)
    params = different_params(policy, 3)
    other = {name: 2.0 * p + 0.1 for name, p in params.items()}
    rollout = DeviceRollout(Loop(family=family, policy=policy, tasks=3, episodes=K))
    wave = wave_of(params, SCRIPT[:3])
    first = rollout.run(wave)
    between = rollout.run(
        replace(wave, params=other, tasks=SCRIPT[[4, 3, 1]], seeds=SEEDS[:3] + np.uint64(1))
    )
    assert not torch.equal(first.actions, between.actions)
    again = rollout.run(wave)
    check_same(first, again)
    for task in range(3):
        rows = slice(task, task + 1)
        alone = rollout.run(
            Wave(
                {name: p[rows] for name, p in params.items()},
                SCRIPT[rows],
                SEEDS[rows],
                wave.taken[rows],
                wave.wanted[rows],
                task,
            )
        )
        check_same(Episodes(**{n: v[rows] for n, v in vars(first).items()}), alone)


@pytest.mark.parametrize(("horizon", "tasks", "slots"), [(7, 2, 3), (1, 2, 3), (7, 1, 1)])
def test_what_was_returned_is_not_written_over(horizon: int, tasks: int, slots: int) -> None:
    """The tape is used again, and episodes are copies, also of one step or of one world, where
    the tape's order of axes is the episodes' own."""
    family = Navigation2D(horizon=horizon)
    policy = policy_of(family)
    params = different_params(policy, tasks)
    rollout = DeviceRollout(Loop(family=family, policy=policy, tasks=tasks, episodes=slots))
    first = rollout.run(wave_of(params, torch.ones(tasks, 2), wanted=slots))
    kept = {name: value.clone() for name, value in vars(first).items()}
    rollout.run(wave_of(params, -torch.ones(tasks, 2), taken=5, wanted=slots))
    for name, value in vars(first).items():
        assert torch.equal(value, kept[name]), name


@pytest.mark.parametrize("device", ["cpu", FAKE])
@pytest.mark.parametrize("at_once", [4, 3])
def test_an_action_that_is_not_finite_is_told_with_its_task_and_first_step(
    at_once: int, device: str
) -> None:
    """Task 3 of 4 gives infinity when it sees four steps taken, and its episodes go on after it;
    task 0 does when it sees five. In a part of its own it is alone there."""
    family = ScriptedThere(graph=True)
    policy = make_policy(PolicySettings(layers=()), 2, 3)
    params = different_params(policy, 4)
    params["mean.0.weight"][3] = torch.tensor([[0.0, 0.0, 0.0], [0.0, 1e38, 0.0]])
    if at_once == 4:
        params["mean.0.weight"][0] = torch.tensor([[0.0, 0.0, 0.0], [7e37, 0.0, 0.0]])
    with (
        fake_device(),
        Sampler(family, policy, tasks=at_once, episodes=K, device=device) as sampler,
    ):
        sampler._rollout = DeviceRollout(sampler._loop)
        with pytest.raises(ActionError, match=rf"task 3 \(seed {SEEDS[3]}\), control step 4"):
            sampler.sample(to_device(params, device), torch.zeros(4, 3), SEEDS[:4])


def test_an_action_that_is_not_finite_after_the_end_is_not_looked_at() -> None:
    """It would be infinite in step 4, and the episode ends with step 4, numbered 3."""
    family = ScriptedThere()
    policy = make_policy(PolicySettings(layers=()), 2, 3)
    params = different_params(policy, 1)
    params["mean.0.weight"][0] = torch.tensor([[0.0, 0.0, 0.0], [0.0, 1e38, 0.0]])
    rollout = DeviceRollout(Loop(family=family, policy=policy, tasks=1, episodes=K))
    episodes = rollout.run(wave_of(params, torch.tensor([[4.0, 0.0, 0.0]])))
    assert episodes.alive.sum(2).tolist() == [[4] * K]


def test_a_breakdown_is_kept_with_all_that_led_to_it() -> None:
    """Task 4's in step 2, in the first episode that starts below .6: its number after 6 that went
    before, its start, and two actions in the body's own unit. A later one is not noted."""
    family = ScriptedThere(graph=True)
    policy = policy_of(family)
    loop = Loop(family=family, policy=policy, tasks=M, episodes=K, action_scale=4.0)
    rollout = DeviceRollout(loop)
    wave = replace(wave_of(different_params(policy, M), SCRIPT, taken=6), offset=20)
    episodes = rollout.run(wave)
    starts = episodes.observations[4, :, 0, 0]
    slot = int((starts < 0.6).nonzero()[0])
    found = rollout.divergence
    assert found is not None
    assert (found.task_index, found.task_seed, found.episode) == (24, SEEDS[4], 6 + slot)
    assert found.task.tolist() == SCRIPT[4].double().tolist()
    assert found.start.tolist() == [float(starts[slot])]
    middle, half = torch.tensor([2.0, 0.5, 25.0]), torch.tensor([4.0, 0.5, 15.0]) / 4.0
    controls = middle + half * episodes.actions[4, slot, :2]
    np.testing.assert_allclose(found.actions, controls.numpy(), rtol=1e-6)
    rollout.run(replace(wave, tasks=torch.tensor([[0.0, 1.0, 2.0]] * M)))
    assert rollout.divergence is found


@pytest.mark.parametrize("device", ["cpu", FAKE])
def test_a_breakdown_there_is_seen_again_there(device: Device) -> None:
    """Its start and its actions lead to the same step, in a world on the device by itself."""
    family = ScriptedThere(graph=True)
    experiment: Experiment[TaskFamily] = Experiment(
        name="x", family=family, iterations=1, device=device, physics="warp"
    )
    with fake_device():
        _, broken = sample(DeviceRollout, family, SCRIPT, device=device)
        assert broken is not None
        assert play(experiment, broken).diverged_at == len(broken.actions) - 1 == 1
        calm = replace(broken, task=np.array([0.0, 0.0, 0.0]))
        assert play(experiment, calm).diverged_at is None


def test_too_many_breakdowns_stop_the_sampling() -> None:
    """With the first of them, as on the CPU."""
    family = ScriptedThere()
    policy = policy_of(family)
    with Sampler(family, policy, tasks=2, episodes=K, max_diverged=0.4) as sampler:
        sampler._rollout = DeviceRollout(sampler._loop)
        params = broadcast(policy.initial_parameters(0), 2)
        tasks = torch.tensor([[0.0, 0.0, 0.0], [0.0, 3.0, 2.0]])
        with pytest.raises(SamplingError, match="broke down in 3 of 6 episodes") as stopped:
            sampler.sample(params, tasks, SEEDS[:2])
    assert stopped.value.divergence is not None
    assert stopped.value.divergence.task_index == 1


def test_trouble_is_told_once() -> None:
    """A warning for each call of `sample` that had any, however many parts it is of."""
    family = ScriptedThere(lacking=("no room", ""))
    policy = policy_of(family)
    params = different_params(policy, 4)
    with Sampler(family, policy, tasks=2, episodes=K) as sampler:
        sampler._rollout = DeviceRollout(sampler._loop)
        with pytest.warns(RunWarning, match="^no room$") as warned:
            sampler.sample(params, torch.zeros(4, 3), SEEDS[:4])
        assert len(warned) == 1
        # A warning would be an error.
        sampler.sample(params, torch.zeros(4, 3), SEEDS[:4])


def test_trouble_is_told_where_it_ends_the_sampling() -> None:
    """In the error itself: what had no room may be why every world broke down."""
    family = ScriptedThere(lacking=("no room",))
    policy = policy_of(family)
    with Sampler(family, policy, tasks=1, episodes=K) as sampler:
        sampler._rollout = DeviceRollout(sampler._loop)
        with pytest.raises(SamplingError, match=r"first step of every episode.*no room$") as ended:
            sampler.sample(different_params(policy, 1), torch.tensor([[0.0, 1.0, 2.0]]), SEEDS[:1])
    assert ended.value.divergence is not None


def test_worlds_are_closed_and_cannot_be_watched() -> None:
    family = ScriptedThere()
    loop = Loop(family=family, policy=policy_of(family), tasks=1, episodes=K)
    rollout = DeviceRollout(loop)
    rollout.close()
    assert isinstance(rollout._worlds, ScriptedDeviceWorlds)
    assert rollout._worlds.closed
    with pytest.raises(ValueError, match="only worlds on the CPU can be watched"):
        DeviceRollout(replace(loop, watch=lambda *_: None))


# What crosses over, and what can be captured.


def events(family: TaskFamily, tasks: int, *, at_once: int = 3) -> tuple[int, int]:
    """Crossings and waits of a first rollout on the device, and of a second."""
    policy = policy_of(family)
    counts = []
    with fake_device() as kept:
        loop = Loop(family=family, policy=policy, tasks=at_once, episodes=K, device=FAKE)
        rollout = DeviceRollout(loop)
        params = to_device(different_params(policy, tasks), FAKE)
        for taken in (0, K):
            kept.clear()
            rollout.run(wave_of(params, tasks_of(family, tasks), taken=taken))
            counts.append(kept.events())
    first, second = counts
    return first, second


@pytest.mark.parametrize("family", [Graphed, Navigation2D])
def test_an_episode_crosses_over_and_waits_no_more_the_longer_it_is(
    family: type[Navigation2D],
) -> None:
    """For any number of steps the same: seeds, indices, tasks and slots go there, and whether all
    went well comes back. Captured, a step that did more would raise an error."""
    short, long = (events(family(horizon=h, goal_radius=0.0), 3) for h in (2, 9))
    assert short == long
    assert short == (5, 5)
    assert events(family(horizon=4, goal_radius=0.0), 2) == (5, 5)


def test_a_control_step_is_run_by_python_only_to_capture_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Twice to rehearse, once to capture, and never again in episodes of any number of steps."""
    calls: list[int] = []
    good = GraphedWorlds.step

    def spy(self: GraphedWorlds, actions: Tensor, where: Tensor | None = None) -> Transition:
        calls.append(self.count)
        return good(self, actions, where)

    monkeypatch.setattr(GraphedWorlds, "step", spy)
    events(Graphed(horizon=9), 3)
    assert calls == [3 * K] * 3


def test_tasks_may_be_on_the_device_too() -> None:
    """For either kind of worlds: the same episodes as of tasks on the CPU."""
    tasks = tasks_of(NAVIGATION)
    for kind in (HostRollout, DeviceRollout):
        expected, _ = sample(kind, NAVIGATION, tasks)
        with fake_device():
            found, _ = sample(kind, NAVIGATION, tasks.to(FAKE), device=FAKE)
        check_same(expected, found)


def test_what_cannot_be_captured_is_an_error() -> None:
    """The test of the test: a step that looks at a number, one that copies from the CPU, and one
    that may be captured, which is done again on the same memory."""
    with fake_device():
        there, here = torch.zeros(3, device=FAKE), torch.ones(3)

        def look() -> None:
            there.mul_(float(there.sum()))

        def bring() -> None:
            there.copy_(here)

        def work() -> None:
            there.add_(1.0)[1:].mul_(2.0)
            there.sub_(0.5 * there)

        for body, what in ((look, "_local_scalar_dense"), (bring, "to the device")):
            with pytest.raises(CaptureError, match=what):
                captured(body)
        there.zero_()
        replay = captured(work)
        assert there.tolist() == [0.5, 1.0, 1.0]
        replay()
        assert there.tolist() == [0.75, 2.0, 2.0]


class TorchPhysics:
    """`Physics` in torch alone, of no body in particular: enough for what families do with it."""

    def __init__(self, model: mujoco.MjModel, count: int, device: str | torch.device) -> None:
        self.model = model
        self.count = count
        self.qpos = torch.zeros(count, model.nq, device=device)
        self.qvel = torch.zeros(count, model.nv, device=device)
        self.diverged = torch.zeros(count, dtype=torch.bool, device=device)
        self.device = self.qpos.device

    def sensor(self, name: str) -> Tensor:
        return self.qpos[:, :3] + 0.1 * self.qvel[:, :3]

    def state(self, world: int) -> Mapping[str, Floats]:
        return {}

    def data(self, world: int) -> mujoco.MjData:
        raise NotImplementedError

    def set_state(self, qpos: Tensor, qvel: Tensor, where: Tensor | None = None) -> None:
        assert where is not None
        rows = where.unsqueeze(1)
        self.qpos.copy_(torch.where(rows, qpos, self.qpos))
        self.qvel.copy_(torch.where(rows, qvel, self.qvel))
        self.diverged = self.diverged & ~where

    def step(self, ctrl: Tensor, substeps: int, where: Tensor | None = None) -> None:
        assert where is not None
        rows = where.unsqueeze(1)
        for _ in range(substeps):
            moved = self.qvel.clone()
            moved[:, : ctrl.shape[1]] += 1.5 / substeps * ctrl
            self.qvel.copy_(torch.where(rows, moved, self.qvel))
            size = min(self.model.nq, self.model.nv)
            placed = self.qpos.clone()
            placed[:, :size] += 0.1 / substeps * self.qvel[:, :size]
            self.qpos.copy_(torch.where(rows, placed, self.qpos))
        self.diverged = (self.qpos.abs() > 1.3).any(1) & where

    def trouble(self) -> str:
        return ""

    def as_graph(self, body: Callable[[], None]) -> Callable[[], None]:
        return rehearsed(body)


LOCOMOTION: list[LocomotionFamily] = [
    kind(protocol=protocol, horizon=5)
    for kind in (HalfCheetahVel, HalfCheetahDir, AntVel, AntDir)
    for protocol in ("paper", "gymnasium")
]


@pytest.mark.parametrize("family", LOCOMOTION, ids=lambda f: f"{f.name}-{f.protocol}")
def test_a_bodys_control_step_is_captured(
    family: LocomotionFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Observation, reward and ending of every body under both protocols: on the device nothing
    crosses over and nothing is waited for within a step, replayed it does what it did; and the
    same episodes come out as when Python runs every step on the CPU."""

    def make(
        self: LocomotionFamily, count: int, *, device: str, settings: WarpSettings
    ) -> DeviceWorlds:
        physics = TorchPhysics(self.build_model(self.sensors), count, device)
        if device == "cpu":
            monkeypatch.setattr(physics, "as_graph", lambda body: body)
        return LocomotionWorlds(self, physics)

    monkeypatch.setattr(LocomotionFamily, "make_device_worlds", make)
    tasks = tasks_of(family)
    plain, broken = sample(DeviceRollout, family, tasks, at_once=3)
    assert len(set(plain.alive.sum(2).flatten().tolist())) > 1
    with fake_device():
        found, divergence = sample(DeviceRollout, family, tasks, at_once=3, device=FAKE)
    check_same(plain, found)
    check_same_divergence(broken, divergence)


def test_what_is_asked_for_in_an_update_costs_no_control_step() -> None:
    """Sampling within `reproducible` runs as it comes, and what was asked for holds again after."""
    asked: list[bool] = []

    class Asking(NavigationWorlds):
        def step(self, actions: Tensor, where: Tensor | None = None) -> Transition:
            asked.append(torch.are_deterministic_algorithms_enabled())
            return super().step(actions, where)

    @dataclass(frozen=True, kw_only=True)
    class Family(Navigation2D):
        name: ClassVar[str] = "asking"

        def make_device_worlds(
            self, count: int, *, device: str | torch.device, settings: WarpSettings
        ) -> DeviceWorlds:
            return Asking(self, count, device)

    family = Family(horizon=2)
    policy = policy_of(family)
    with fake_device(), reproducible(FAKE):
        params = to_device(different_params(policy, 1), FAKE)
        with Sampler(family, policy, tasks=1, episodes=K, device=FAKE, physics="warp") as sampler:
            assert isinstance(sampler._rollout, DeviceRollout)
            sampler.sample(params, tasks_of(family, 1), task_seeds(TRAINING, 0, 0, 0, 1))
        assert torch.are_deterministic_algorithms_enabled()
    assert asked == [False, False]
