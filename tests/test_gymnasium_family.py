"""Environments from elsewhere as families: a pendulum, and one that watches its caller."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import numpy.typing as npt
import pytest
import torch
import yaml
from gymnasium.spaces import Box, Discrete, Space

import envs
from envs import FamilyError, GymnasiumFamily, from_gymnasium
from envs.gymnasium_family import AnyEnv
from envs.references import allow_imports, refer_to, resolve
from maml_rl.episodes import Episodes
from maml_rl.policy import GaussianPolicy, PolicySettings, make_policy
from maml_rl.sampler import Sampler, task_seeds
from maml_rl.seeds import TRAINING

Array = npt.NDArray[np.float32]


def make_pendulum() -> AnyEnv:
    return gymnasium.make("Pendulum-v1")


def sample_gravities(count: int, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    return rng.uniform(2.0, 12.0, (count, 1))


def set_gravity(env: AnyEnv, task: Array) -> None:
    env.unwrapped.g = float(task[0])  # type: ignore[attr-defined]  # Pendulum's own


def pendulum(horizon: int = 7) -> GymnasiumFamily:
    return from_gymnasium(
        make_pendulum,
        sample_gravities,
        set_gravity,
        horizon=horizon,
        task_names=("gravity",),
        task_units=("m/s^2",),
    )


class Ledger(gymnasium.Env[npt.NDArray[np.float64], npt.NDArray[np.float64]]):
    """Adds up its 1 x 3 actions from a random start, and writes down what is done to it.

    Observation (2, 2): [[sum of actions, steps], [task]]. Ends after as many steps as task 0
    says, and complains of any step beyond. While the sum is beyond task 1, and below 1e99, the
    reward is NaN.
    """

    observation_space = Box(-np.inf, np.inf, (2, 2), np.float64)
    action_space = Box(np.array([[-1.0, 0.0, 2.0]]), np.array([[3.0, 0.5, 2.25]]), dtype=np.float64)

    def __init__(self) -> None:
        self.task: Array = np.zeros(2, np.float32)
        self.log: list[str] = []
        self.actions: list[list[float]] = []

    def _observe(self) -> npt.NDArray[np.float64]:
        return np.array([[self.total, self.steps], [*self.task]])

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[npt.NDArray[np.float64], dict[str, Any]]:
        super().reset(seed=seed)
        self.log.append(f"reset {seed}")
        self.total, self.steps = float(self.np_random.uniform()), 0
        return self._observe(), {}

    def step(
        self, action: npt.NDArray[np.float64]
    ) -> tuple[npt.NDArray[np.float64], float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action), action
        assert self.steps < self.task[0], "stepped past its end"
        self.actions.append(action[0].tolist())
        self.total, self.steps = self.total + float(action.sum()), self.steps + 1
        reward = np.nan if float(self.task[1]) < self.total < 1e99 else float(self.steps)
        return self._observe(), reward, self.steps >= self.task[0], False, {}


LEDGERS: list[Ledger] = []


def make_ledger() -> Ledger:
    LEDGERS.append(Ledger())
    return LEDGERS[-1]


def sample_lengths(count: int, rng: np.random.Generator) -> list[list[float]]:
    return [[float(rng.integers(1, 6)), 1e9] for _ in range(count)]


def set_length(env: AnyEnv, task: Array) -> None:
    assert isinstance(env, Ledger)
    env.log.append("task")
    env.task = task


def ledger() -> GymnasiumFamily:
    return from_gymnasium(make_ledger, sample_lengths, set_length, horizon=6)


def sample(
    family: GymnasiumFamily, tasks: list[list[float]], seeds: Any, at_once: int, **more: Any
) -> Episodes:
    """Sample 3 episodes of each task with a small random policy, `at_once` tasks together."""
    policy: GaussianPolicy = make_policy(
        PolicySettings(layers=(5,)), len(family.observation_columns), len(family.action_columns)
    )
    theta = policy.initial_parameters(4)
    params = {n: p.expand(len(tasks), *p.shape) for n, p in theta.items()}
    with Sampler(family, policy, tasks=at_once, episodes=3, **more) as sampler:
        return sampler.sample(params, torch.tensor(tasks), seeds)


SEEDS = task_seeds(TRAINING, 0, 0, 0, 2)


def test_the_sampler_trains_on_it() -> None:
    """Full episodes of the pendulum: shapes, unclipped actions, rewards that are costs."""
    episodes = sample(pendulum(), [[9.0], [3.0]], SEEDS, 2)
    assert episodes.observations.shape == (2, 3, 7, 3)
    assert episodes.actions.shape == (2, 3, 7, 1)
    assert episodes.measures.shape == (2, 3, 7, 0)
    assert bool(episodes.alive.all())
    assert bool((episodes.rewards < 0).all())
    assert bool(episodes.returns().isfinite().all())


def test_tasks_differ_and_seeds_reproduce() -> None:
    """Same seeds, other gravity: same first observation, another course. Same all: same bits."""
    seeds = np.repeat(SEEDS[:1], 2)
    first = sample(pendulum(), [[9.0], [3.0]], seeds, 2)
    heavy, light = first.observations
    assert torch.equal(heavy[:, 0], light[:, 0])
    assert not torch.isclose(heavy[:, -1], light[:, -1], rtol=1e-3).all(-1).any()
    again = sample(pendulum(), [[9.0], [3.0]], seeds, 2)
    other = sample(pendulum(), [[9.0], [3.0]], SEEDS[::-1].copy(), 2)
    for name, value in vars(first).items():
        assert torch.equal(value, vars(again)[name]), name
    assert not torch.isclose(first.observations[0, :, 0], other.observations[0, :, 0]).any()
    # The episodes of one task differ from each other.
    assert len(torch.unique(heavy[:, 0], dim=0)) == 3


@pytest.mark.parametrize("count", ["episodes", "steps"])
def test_tasks_together_are_tasks_alone(count: str) -> None:
    """To the bit, whatever shares the worlds; with waves of episodes that end early, too."""
    family, tasks = ledger(), [[2.0, 1e9], [5.0, 1e9]]
    together = sample(family, tasks, SEEDS, 2, count=count)
    alone = [sample(family, [t], SEEDS[i : i + 1], 1, count=count) for i, t in enumerate(tasks)]
    wanted = {"episodes": [6, 15], "steps": [18, 20]}[count]
    assert together.live_steps.tolist() == wanted
    for i, single in enumerate(alone):
        slots = single.alive.shape[1]
        live = single.alive[0]
        assert torch.equal(together.alive[i, :slots], live)
        for name in ("observations", "actions", "rewards", "log_probs"):
            ours, theirs = getattr(together, name)[i, :slots], getattr(single, name)[0]
            assert torch.equal(ours[live], theirs[live]), name


def test_steps_are_the_environments_own() -> None:
    """A pendulum stepped by hand from the same task, seed and clipped actions."""
    family = pendulum()
    starts = np.array([[7.0], [12345.0]])
    tasks = torch.tensor([[4.0], [11.0]])
    actions = torch.tensor([[[1.5], [-9.0]], [[0.25], [2.0]]])
    with family.make_worlds(2) as worlds:
        observations = [worlds.reset(tasks, starts)]
        steps = [worlds.step(a) for a in actions]
    observations += [s.observations for s in steps]
    for row in range(2):
        env = make_pendulum()
        set_gravity(env, tasks[row].numpy())
        observation, _ = env.reset(seed=int(starts[row, 0]))
        np.testing.assert_array_equal(observations[0][row], observation)
        for t, step in enumerate(steps):
            observation, reward, *_ = env.step(np.clip(actions[t, row].numpy(), -2.0, 2.0))
            np.testing.assert_array_equal(observations[t + 1][row], observation)
            assert float(step.rewards[row]) == np.float32(reward)


def test_observations_actions_and_bounds_are_flattened_and_clipped() -> None:
    """A (1, 3) action with bounds [-1, 3], [0, .5] and [2, 2.25]; a (2, 2) observation."""
    family = ledger()
    assert len(family.observation_columns) == 4
    low, high = family.action_bounds
    np.testing.assert_array_equal([low, high], [[-1.0, 0.0, 2.0], [3.0, 0.5, 2.25]])
    with family.make_worlds(2) as worlds:
        mine = LEDGERS[-2:]
        worlds.reset(torch.tensor([[3.0, 1e9], [4.0, 1e9]]), np.array([[1.0], [2.0]]))
        step = worlds.step(torch.tensor([[-7.0, 0.25, 2.125], [9.0, -1.0, 5.0]]))
    assert [env.actions for env in mine] == [[[-1.0, 0.25, 2.125]], [[3.0, 0.0, 2.25]]]
    np.testing.assert_array_equal(step.observations[:, 1:], [[1.0, 3.0, 1e9], [1.0, 4.0, 1e9]])


def test_masked_worlds_alone_are_reset_and_stepped_and_never_past_their_end() -> None:
    """The task is set before each reset; those left out are not touched; the ended rest."""
    family = ledger()
    worlds = family.make_worlds(3)
    mine = LEDGERS[-3:]
    lengths = torch.tensor([[1.0, 1e9], [2.0, 1e9], [3.0, 1e9]])
    worlds.reset(lengths, np.array([[11.0], [12.0], [13.0]]))
    assert [env.log for env in mine] == [["task", f"reset {n}"] for n in (11, 12, 13)]
    actions = torch.ones(3, 3)
    ends = [worlds.step(actions).terminated.tolist() for _ in range(2)]
    assert ends == [[True, False, False], [True, True, False]]
    # World 0, whose episode is over, is asked to step and does not; 1 and 2 are not asked.
    only = torch.tensor([True, False, False])
    worlds.step(actions, only)
    assert [env.steps for env in mine] == [1, 2, 2]
    again = worlds.reset(9 * lengths, np.array([[21.0], [22.0], [23.0]]), only)
    assert [env.log[2:] for env in mine] == [["task", "reset 21"], [], []]
    np.testing.assert_array_equal(again[:, 1:3], [[0.0, 9.0], [2.0, 2.0], [2.0, 3.0]])
    step = worlds.step(actions)
    assert [env.steps for env in mine] == [1, 2, 3]
    assert step.terminated.tolist() == [False, True, True]
    assert not step.diverged.any()
    worlds.close()


def test_a_reward_or_observation_that_is_not_finite_counts_as_diverged() -> None:
    """World 1's reward turns NaN in its first step; it then rests, until a reset."""
    family = ledger()
    worlds = family.make_worlds(2)
    tasks, starts = torch.tensor([[5.0, 1e9], [5.0, 0.0]]), np.array([[1.0], [2.0]])
    worlds.reset(tasks, starts)
    assert worlds.step(torch.ones(2, 3)).diverged.tolist() == [False, True]
    step = worlds.step(torch.full((2, 3), torch.nan), torch.tensor([False, True]))
    assert step.diverged.tolist() == [False, True]
    worlds.reset(torch.tensor([[5.0, 1e9], [5.0, 1e9]]), starts)
    assert worlds.step(torch.ones(2, 3)).diverged.tolist() == [False, False]
    # 1e300 fits the environment's float64 and not our float32.
    LEDGERS[-1].total = 1e300
    step = worlds.step(torch.ones(2, 3))
    assert step.diverged.tolist() == [False, True]
    worlds.close()


def make_short_pendulum() -> AnyEnv:
    return gymnasium.make("Pendulum-v1", max_episode_steps=4)


def test_the_time_limit_ends_the_episode_and_is_the_default_horizon() -> None:
    """Truncated after 4 steps is ended for us; without one, a horizon must be given."""
    family = from_gymnasium(make_short_pendulum, sample_gravities, set_gravity)
    assert family.episode_steps == 4
    longer = dataclasses.replace(family, horizon=7)
    episodes = sample(longer, [[9.0], [3.0]], SEEDS, 2)
    assert episodes.alive.sum(2).tolist() == [[4] * 3] * 2
    shorter = dataclasses.replace(family, horizon=2)
    assert sample(shorter, [[9.0]], SEEDS[:1], 1).alive.shape == (1, 3, 2)
    with pytest.raises(FamilyError, match="no time limit: give horizon"):
        from_gymnasium(make_ledger, sample_lengths, set_length)


def test_an_episodes_start_is_a_seed() -> None:
    """(1,) float64, whole, in [0, 2^31), and another each time."""
    rng = np.random.default_rng(3)
    starts = np.stack([pendulum().draw_start(rng) for _ in range(50)])
    assert starts.shape == (50, 1)
    assert starts.dtype == np.float64
    np.testing.assert_array_equal(starts, np.floor(starts))
    assert 2**30 < starts.max() < 2**31
    assert len(np.unique(starts)) == 50


def test_a_config_holds_it() -> None:
    """Its fields survive YAML as plain values, and build the same family with no import."""
    family = pendulum()
    assert family.name == "gymnasium"
    assert family.task_columns == (envs.Column("gravity", "m/s^2"),)
    assert family.describe_task([9.81]) == "gravity 9.81 m/s^2"
    fields = {
        k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(family).items()
    }
    assert set(fields) == {
        "make_env",
        "draw_tasks",
        "set_task",
        "horizon",
        "task_names",
        "task_units",
    }
    loaded = yaml.safe_load(yaml.safe_dump(fields))
    assert loaded["make_env"] == f"{__name__}:make_pendulum"
    assert envs.make("gymnasium", **loaded) == family
    plain = from_gymnasium(make_ledger, sample_lengths, set_length, horizon=3)
    assert plain.task_names == ("task_0", "task_1")


def test_functions_without_a_name_of_their_own_do_not_replace_each_other() -> None:
    """Two lambdas of one function have one qualified name; each family keeps its own."""
    families = [
        from_gymnasium(make_pendulum, lambda count, rng: np.full((count, 1), 3.0), set_gravity),
        from_gymnasium(make_pendulum, lambda count, rng: np.full((count, 1), 5.0), set_gravity),
    ]
    rng = np.random.default_rng(0)
    assert [f.sample_tasks(1, rng).item() for f in families] == [3.0, 5.0]
    with pytest.raises(FamilyError, match=r"'x:f.<lambda>' is not"):
        resolve("x:f.<lambda>")


class Spaces(gymnasium.Env[Any, Any]):
    """An environment of which only the spaces count."""

    def __init__(self, observation: Space[Any], action: Space[Any]) -> None:
        self.observation_space, self.action_space = observation, action


NUMBERS = Box(-1.0, 1.0, (3,), np.float32)


@pytest.mark.parametrize(
    ("observation", "action", "told"),
    [
        (NUMBERS, Discrete(3), "the action space must be a Box of floats, got Discrete"),
        (Discrete(3), NUMBERS, "the observation space must be a Box of floats, got Discrete"),
        (Box(0, 255, (4,), np.uint8), NUMBERS, "observation space must be a Box of floats"),
        (NUMBERS, Box(0, 4, (2,), np.int64), "action space must be a Box of floats"),
        (NUMBERS, Box(-np.inf, 1.0, (2,), np.float32), "action space must be bounded"),
    ],
)
def test_other_spaces_are_refused(observation: Any, action: Any, told: str) -> None:
    """When the family is built, in one sentence."""
    with pytest.raises(FamilyError, match=told) as refused:
        from_gymnasium(
            lambda: Spaces(observation, action), sample_gravities, set_gravity, horizon=3
        )
    assert "\n" not in str(refused.value)


def test_wrong_functions_are_refused() -> None:
    """What is no environment, no new one, or no batch of finite tasks of one width."""
    with pytest.raises(FamilyError, match=r"must return a gymnasium.Env, got 3"):
        from_gymnasium(lambda: 3, sample_gravities, set_gravity)  # type: ignore[arg-type, return-value]  # the point
    one = make_pendulum()
    family = from_gymnasium(lambda: one, sample_gravities, set_gravity)
    with pytest.raises(FamilyError, match="a new one at each call"):
        family.make_worlds(2)
    bad = iter([np.ones(2), np.ones((3, 1)), np.full((2, 1), np.nan)])
    for _ in range(3):
        with pytest.raises(FamilyError, match=r"must return finite tasks \(2, P\)"):
            from_gymnasium(make_pendulum, lambda count, rng: next(bad), set_gravity)
    growing = iter([1, 2])
    family = from_gymnasium(
        make_pendulum, lambda count, rng: np.ones((count, next(growing))), set_gravity
    )
    with pytest.raises(FamilyError, match="tasks of task_0, got 2 numbers"):
        family.sample_tasks(5, np.random.default_rng(0))
    with pytest.raises(FamilyError, match="1 numbers, but task_units has 2"):
        dataclasses.replace(pendulum(), task_units=("m", "s"))
    with pytest.raises(FamilyError, match="a name twice"):
        from_gymnasium(make_ledger, sample_lengths, set_length, horizon=3, task_names=("a", "a"))
    with pytest.raises(FamilyError, match="give make_env, a reference"):
        envs.make("gymnasium", horizon=3)
    with pytest.raises(FamilyError, match=r"set_task .*:NUMBERS is no function"), allow_imports():
        from_gymnasium(make_pendulum, sample_gravities, f"{__name__}:NUMBERS")


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a new module of the user's own, whose import leaves a mark."""
    name = "code_of_mine_" + tmp_path.name.replace("-", "_")
    (tmp_path / f"{name}.py").write_text(
        """
import gymnasium
import envs

def build():
    return gymnasium.make("Pendulum-v1")

def tasks(count, rng):
    return rng.uniform(2, 12, (count, 1))

def weigh(env, task):
    env.unwrapped.g = task[0]

class Small(envs.Navigation2D):
    name = "small"

number = 3
"""
    )
    (tmp_path / f"{name}_needy.py").write_text("import no_such_dependency\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield name
    sys.modules.pop(name, None)


def test_code_is_imported_only_where_allowed(mine: str) -> None:
    """Refused without running it; allowed in the block; known from then on."""
    references = {"make_env": f"{mine}:build", "draw_tasks": f"{mine}:tasks"}
    references["set_task"] = f"{mine}:weigh"
    told = f"{mine}:build is code of yours: add --allow-import to run it"
    with pytest.raises(FamilyError, match=told):
        envs.make("gymnasium", **references)
    assert mine not in sys.modules
    with allow_imports():
        family = envs.make("gymnasium", **references, horizon=5)
    with family.make_worlds(1) as worlds:
        observations = worlds.reset(torch.tensor([[3.0]]), np.array([[1.0]]))
    assert observations.shape == (1, 3)
    with pytest.raises(FamilyError, match="add --allow-import"):
        resolve(f"{mine}:number")
    with pytest.raises(RuntimeError), allow_imports():
        raise RuntimeError
    with pytest.raises(FamilyError, match="add --allow-import"):
        resolve(f"{mine}:number")


def test_references_that_lead_nowhere_say_where_they_stopped(mine: str) -> None:
    """A module that is not there, one it needs, an attribute, and what is no reference."""
    cases = [
        ("no_such_module.inner:build", "there is no module 'no_such_module'"),
        (f"{mine}_needy:build", "there is no module 'no_such_dependency'"),
        (f"{mine}:biuld", "has no 'biuld': did you mean 'build'"),
        (f"{mine}:Small.mesure_columns", "did you mean 'measure_columns'"),
        (mine, "a reference is package.module:name"),
        (f"{mine}:", "a reference is package.module:name"),
        (":build", "a reference is package.module:name"),
        ("a b:build", "a reference is package.module:name"),
        ("..escape:build", "a reference is package.module:name"),
    ]
    with allow_imports():
        for reference, told in cases:
            with pytest.raises(FamilyError, match=told):
                resolve(reference)


def test_a_family_of_the_users_own_is_named_by_reference(mine: str) -> None:
    """package.module:Class is built like any other; what is no family is refused."""
    with pytest.raises(FamilyError, match="add --allow-import"):
        envs.make(f"{mine}:Small", horizon=3)
    with allow_imports():
        family = envs.make(f"{mine}:Small", horizon=3)
        assert (family.name, family.episode_steps) == ("small", 3)
        with pytest.raises(FamilyError, match="did you mean 'horizon'"):
            envs.make(f"{mine}:Small", horizn=3)
        for other in (f"{mine}:number", f"{mine}:build", "envs:FamilyError"):
            with pytest.raises(FamilyError, match=r"not a subclass of envs.TaskFamily"):
                envs.family_class(other)


def test_a_registered_class_needs_no_import() -> None:
    """refer_to gives the reference that resolve takes, and twice the same."""

    class Own(envs.Navigation2D):
        name = "own"

    reference = refer_to(Own)
    assert refer_to(Own) == reference
    assert envs.family_class(reference) is Own


def test_gymnasium_is_a_name_but_does_not_ship_with_a_body() -> None:
    """family_class finds it and its misspelling; FAMILIES, which are to be trained, lacks it."""
    assert envs.family_class("gymnasium") is GymnasiumFamily
    assert "gymnasium" not in envs.FAMILIES
    with pytest.raises(FamilyError, match="did you mean 'gymnasium'"):
        envs.family_class("gymnasum")
