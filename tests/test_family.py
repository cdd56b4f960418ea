"""The contract, kept by every family that `envs.FAMILIES` lists, under each of its protocols.

A new family is covered from the moment it is listed.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

import envs
from envs.family import Column, FamilyError, TaskFamily, Transition, Worlds, check_range, decided
from envs.locomotion import LocomotionFamily

Floats = npt.NDArray[np.float64]

WORLDS, STEPS = 3, 5


def protocols_of(name: str) -> list[str]:
    """The protocols of a family that has any."""
    cls = envs.FAMILIES[name]
    return list(cls.protocols) if issubclass(cls, LocomotionFamily) else []


CASES = [
    (name, {"protocol": protocol} if protocol else {})
    for name in envs.FAMILIES
    for protocol in protocols_of(name) or [""]
]


@pytest.fixture(params=CASES, ids=lambda case: "-".join([case[0], *case[1].values()]))
def family(request: pytest.FixtureRequest) -> TaskFamily:
    name, fields = request.param
    return envs.make(name, **fields)


class Plan(NamedTuple):
    """Tasks, starts and actions of N worlds; actions reach half beyond the bounds."""

    tasks: Tensor  # (N, P)
    starts: Floats  # (N, S)
    actions: Tensor  # (T, N, A)


def make_plan(family: TaskFamily, seed: int = 5) -> Plan:
    rng = np.random.default_rng(seed)
    low, high = family.action_bounds
    actions = rng.uniform(1.5 * low, 1.5 * high, (STEPS, WORLDS, len(low)))
    return Plan(
        torch.from_numpy(family.sample_tasks(WORLDS, rng)),
        np.stack([family.draw_start(rng) for _ in range(WORLDS)]),
        torch.from_numpy(actions).float(),
    )


def rows(transition: Transition, where: slice | Tensor) -> list[list[float]]:
    """Some worlds' part of a transition, flat, to be compared exactly."""
    return [field[where].flatten().tolist() for field in transition]


def trace(worlds: Worlds, plan: Plan) -> list[list[list[float]]]:
    """Reset all worlds, step them through, and return every bit of what came out."""
    first = worlds.reset(plan.tasks, plan.starts)
    return [[first.flatten().tolist()]] + [
        rows(worlds.step(action), slice(None)) for action in plan.actions
    ]


def test_columns_are_named_with_units_and_without_duplicates(family: TaskFamily) -> None:
    for columns in (
        family.task_columns,
        family.observation_columns,
        family.action_columns,
        family.measure_columns,
    ):
        assert columns
        assert all(isinstance(column, Column) for column in columns)
        assert all(column.name.isidentifier() and column.unit.strip() for column in columns)
        assert len({column.name for column in columns}) == len(columns)


def test_the_name_is_the_one_it_is_listed_under(family: TaskFamily) -> None:
    assert envs.FAMILIES[family.name] is type(family)
    assert family.name.isidentifier()
    assert family.name == family.name.lower()


def test_action_bounds_are_low_and_high_of_each_action(family: TaskFamily) -> None:
    low, high = family.action_bounds
    assert low.shape == high.shape == (len(family.action_columns),)
    assert np.isfinite([low, high]).all()
    assert (low < high).all()


def test_shapes_and_types_are_those_of_the_columns(family: TaskFamily) -> None:
    plan = make_plan(family)
    O = len(family.observation_columns)  # noqa: E741  # the page's letter
    Q = len(family.measure_columns)
    with family.make_worlds(WORLDS, threads=1) as worlds:
        assert worlds.count == WORLDS
        first = worlds.reset(plan.tasks, plan.starts)
        assert (first.shape, first.dtype) == ((WORLDS, O), torch.float32)
        transition = worlds.step(plan.actions[0])
    assert [(tuple(field.shape), field.dtype) for field in transition] == [
        ((WORLDS, O), torch.float32),
        ((WORLDS,), torch.float32),
        ((WORLDS,), torch.bool),
        ((WORLDS,), torch.bool),
        ((WORLDS, Q), torch.float32),
    ]
    assert not transition.diverged.any()


@pytest.mark.parametrize("count", [1, 7])
def test_tasks_are_rows_of_float32_and_follow_the_generator(family: TaskFamily, count: int) -> None:
    tasks = family.sample_tasks(count, np.random.default_rng(11))
    assert tasks.shape == (count, len(family.task_columns))
    assert tasks.dtype == np.float32
    np.testing.assert_array_equal(tasks, family.sample_tasks(count, np.random.default_rng(11)))
    for task in tasks:
        checked = family.check_task(task.tolist())
        assert checked.dtype == np.float32
        np.testing.assert_array_equal(checked, task)


def test_what_is_no_task_is_refused_by_name_and_unit(family: TaskFamily) -> None:
    """Too wide, empty, NaN and infinite; the message says what a task is and what came."""
    P = len(family.task_columns)
    column = family.task_columns[0]
    wide, nan, infinite = [1.0] * (P + 1), [float("nan")] * P, [1.0] * (P - 1) + [float("inf")]
    for task in (wide, [], nan, infinite):
        with pytest.raises(FamilyError) as caught:
            family.check_task(task)
        for words in (family.name, column.name, column.unit, repr(task)):
            assert words in str(caught.value)
        with pytest.raises(FamilyError):
            family.describe_task(task)


def test_finitely_many_tasks_are_all_drawn_and_no_other(family: TaskFamily) -> None:
    finite = family.finite_tasks
    tasks = family.sample_tasks(64, np.random.default_rng(2))
    drawn = {tuple(task.tolist()) for task in tasks}
    if finite is None:
        assert len(drawn) == 64
        return
    assert finite.dtype == np.float32
    assert drawn == {tuple(task.tolist()) for task in finite}
    between = finite.mean(axis=0)
    assert tuple(between.tolist()) not in drawn
    with pytest.raises(FamilyError, match="one of"):
        family.check_task(between)


def test_tasks_are_told_apart_in_words(family: TaskFamily) -> None:
    tasks = family.sample_tasks(16, np.random.default_rng(2))
    words = {tuple(task.tolist()): family.describe_task(task) for task in tasks}
    assert all(text.strip() for text in words.values())
    assert len(set(words.values())) == len(words)


def test_measures_keep_their_shape_whatever_the_task(family: TaskFamily) -> None:
    """(M, H, Q) goes in and comes out, task by task; a task on its own gets the same."""
    plan = make_plan(family)
    measures = torch.arange(1.0, 1 + WORLDS * 4).reshape(WORLDS, 4, 1)
    wanted = family.wanted_measures(measures, plan.tasks)
    assert wanted.shape == measures.shape
    for i in range(WORLDS):
        alone = family.wanted_measures(measures[i : i + 1], plan.tasks[i : i + 1])
        assert alone.tolist() == wanted[i : i + 1].tolist()


def test_the_same_generator_makes_the_same_start(family: TaskFamily) -> None:
    """A draw is a function of the generator's state alone, and later draws go on from there."""
    first, second = np.random.default_rng(7), np.random.default_rng(7)
    starts = [family.draw_start(first) for _ in range(3)]
    for start in starts:
        assert start.dtype == np.float64
        assert start.ndim == 1
        np.testing.assert_array_equal(start, family.draw_start(second))
    if starts[0].size:
        assert not (starts[0] == starts[1]).any()
    assert first.random() == second.random()


def test_the_same_start_is_the_same_episode(family: TaskFamily) -> None:
    """Whatever the worlds did before: tasks, starts and actions decide every bit."""
    plan, other = make_plan(family), make_plan(family, seed=6)
    with family.make_worlds(WORLDS, threads=1) as worlds:
        first = trace(worlds, plan)
        different = trace(worlds, other)
        assert trace(worlds, plan) == first
    assert different != first


@pytest.mark.parametrize("threads", [1, 2])
def test_a_world_in_a_batch_is_the_world_alone(family: TaskFamily, threads: int) -> None:
    plan = make_plan(family)
    with family.make_worlds(WORLDS, threads=threads) as worlds:
        together = worlds.reset(plan.tasks, plan.starts)
        steps = [worlds.step(action) for action in plan.actions]
    for i in range(WORLDS):
        me = slice(i, i + 1)
        with family.make_worlds(1, threads=1) as worlds:
            alone = worlds.reset(plan.tasks[me], plan.starts[me])
            assert alone.tolist() == together[me].tolist()
            for step, action in zip(steps, plan.actions, strict=True):
                assert rows(worlds.step(action[me]), slice(None)) == rows(step, me)


def test_worlds_left_out_of_a_step_or_reset_are_untouched(family: TaskFamily) -> None:
    """Worlds step at odds and one restarts with another task; each lives as it would alone.

    The rows of idle worlds are poisoned with 99 in tasks, starts and actions.
    """
    plan, second = make_plan(family), make_plan(family, seed=6)
    schedule = torch.tensor(
        [
            [True, False, True],
            [False, True, True],
            [True, True, False],
            [True, True, True],
            [False, True, True],
        ]
    )
    again = torch.tensor([False, False, True])  # World 2 restarts before its fourth row.
    with family.make_worlds(WORLDS, threads=2) as worlds:
        worlds.reset(plan.tasks, plan.starts)
        lives: list[list[list[list[float]]]] = [[] for _ in range(WORLDS)]
        for t, where in enumerate(schedule):
            if t == 3:
                observations = worlds.reset(
                    torch.where(again[:, None], second.tasks, 99.0),
                    np.where(again[:, None].numpy(), second.starts, 99.0),
                    again,
                )
                lives[2].append([observations[2].tolist()])
            transition = worlds.step(torch.where(where[:, None], plan.actions[t], 99.0), where)
            for i in range(WORLDS):
                if where[i]:
                    lives[i].append(rows(transition, slice(i, i + 1)))
    for i in range(WORLDS):
        me = slice(i, i + 1)
        life = []
        with family.make_worlds(1, threads=1) as worlds:
            worlds.reset(plan.tasks[me], plan.starts[me])
            for t, where in enumerate(schedule):
                if t == 3 and i == 2:
                    life.append(worlds.reset(second.tasks[me], second.starts[me]).tolist())
                if where[i]:
                    life.append(rows(worlds.step(plan.actions[t, me]), slice(None)))
        assert lives[i] == life, f"world {i}"


def test_actions_beyond_the_bound_act_as_the_bound(family: TaskFamily) -> None:
    plan = make_plan(family)
    low, high = (torch.from_numpy(bound).float() for bound in family.action_bounds)
    clipped = torch.minimum(torch.maximum(plan.actions, low), high)
    assert (clipped != plan.actions).any(dim=0).any(dim=0).all()
    with family.make_worlds(WORLDS, threads=1) as worlds:
        assert trace(worlds, plan) == trace(worlds, plan._replace(actions=clipped))
        assert trace(worlds, plan) != trace(worlds, plan._replace(actions=0.5 * clipped))


def test_what_was_handed_out_stays_as_it_was(family: TaskFamily) -> None:
    """No tensor of an observation or transition is a view of what the next call writes."""
    plan = make_plan(family)
    with family.make_worlds(WORLDS, threads=1) as worlds:
        first = worlds.reset(plan.tasks, plan.starts)
        transition = worlds.step(plan.actions[0])
        before = [first.clone(), *(field.clone() for field in transition)]
        worlds.step(plan.actions[1])
        worlds.reset(plan.tasks, plan.starts, torch.tensor([True, False, True]))
        worlds.step(plan.actions[2])
        assert [t.tolist() for t in (first, *transition)] == [t.tolist() for t in before]


def test_an_action_is_not_written_to(family: TaskFamily) -> None:
    plan = make_plan(family)
    before = [plan.tasks.clone(), torch.from_numpy(plan.starts.copy()), plan.actions.clone()]
    with family.make_worlds(WORLDS, threads=1) as worlds:
        trace(worlds, plan)
    after = [plan.tasks, torch.from_numpy(plan.starts), plan.actions]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_settings_are_frozen(family: TaskFamily) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        family.horizon = 3  # type: ignore[misc]  # that is what must fail


def test_every_field_is_decided_and_rebuilds_the_family(family: TaskFamily) -> None:
    """Nothing is None once built, and the saved fields build an equal family."""
    fields = dataclasses.asdict(family)
    assert None not in fields.values()
    assert envs.make(family.name, **fields) == family
    changed = dataclasses.replace(family, horizon=13)
    assert changed != family
    assert envs.make(family.name, **dataclasses.asdict(changed)) == changed


def test_a_field_keeps_the_default_of_the_nearest_class_that_names_it(family: TaskFamily) -> None:
    """What a body sets holds, whichever order the bases come in.

    A dataclass gathers its fields base by base, and a base repeats what it inherited: with the
    bases in the wrong order the shared default overwrites the body's own.
    """
    for field in dataclasses.fields(family):
        if field.default is not dataclasses.MISSING:
            assert field.default == getattr(type(family), field.name), field.name


@pytest.mark.parametrize(
    ("name", "protocol"), [(n, p) for n in envs.FAMILIES for p in protocols_of(n)]
)
def test_an_explicit_value_wins_over_the_protocol(name: str, protocol: str) -> None:
    """Each field at the other protocol's value: it holds, and no other field moves."""
    usual = dataclasses.asdict(envs.make(name, protocol=protocol))
    tried = 0
    for other in protocols_of(name):
        for field, value in dataclasses.asdict(envs.make(name, protocol=other)).items():
            if field != "protocol" and value != usual[field]:
                explicit = envs.make(name, protocol=protocol, **{field: value})
                assert dataclasses.asdict(explicit) == {**usual, field: value}
                tried += 1
    assert tried >= 5


def wrong_values(value: object) -> list[object]:
    """Values no field of this kind may take."""
    if isinstance(value, str):
        return ["nonsense"]
    if isinstance(value, tuple):
        return [(float("nan"), *value[1:]), (*value, 1.0), ()]
    return [float("nan"), float("inf"), float("-inf")]


def test_a_wrong_value_fails_when_the_family_is_built(family: TaskFamily) -> None:
    """Every field refuses NaN, infinity and unknown words, naming family, field and value."""
    fields = dataclasses.asdict(family)
    for name, value in fields.items():
        for wrong in wrong_values(value):
            with pytest.raises(FamilyError) as caught:
                envs.make(family.name, **{**fields, name: wrong})
            for words in (family.name, name, str(wrong)):
                assert words in str(caught.value), (name, wrong)


@pytest.mark.parametrize("horizon", [0, -3, 2.5])
def test_the_horizon_is_a_whole_number_of_steps(family: TaskFamily, horizon: int) -> None:
    with pytest.raises(FamilyError, match=rf"{family.name}: horizon .*got {horizon}"):
        dataclasses.replace(family, horizon=horizon)
    assert dataclasses.replace(family, horizon=1).episode_steps == 1


def test_a_control_step_takes_time(family: TaskFamily) -> None:
    assert family.control_seconds > 0


def test_a_range_check_says_what_was_expected() -> None:
    for low, high, words in (
        (0.0, np.inf, "at least 0"),
        (1e-5, 0.1, "between 1e-05 and 0.1"),
        (-np.inf, np.inf, "finite"),
    ):
        with pytest.raises(FamilyError, match=f"^body: width must be {words}, got nan$"):
            check_range("body", "width", float("nan"), low, high)
    check_range("body", "width", 0.1, 0.1, 0.1)
    with pytest.raises(FamilyError, match=r"got 0\.2"):
        check_range("body", "width", 0.2, 0.0, 0.1)


def test_what_nothing_decides_is_refused() -> None:
    assert decided(0) == 0
    with pytest.raises(FamilyError, match="None"):
        decided(None)


@pytest.mark.parametrize("name", ["half_cheetah_dir", "ant_dir"])
def test_balanced_directions_are_equally_often_in_every_batch(name: str) -> None:
    """With an even count the sum is 0, with an odd one -1 or +1, in an order that is drawn."""
    family = envs.make(name, balanced=True)
    rng = np.random.default_rng(4)
    even = [family.sample_tasks(6, rng)[:, 0] for _ in range(20)]
    assert {float(t.sum()) for t in even} == {0.0}
    assert len({tuple(t) for t in even}) > 5
    assert {float(family.sample_tasks(5, rng).sum()) for _ in range(20)} == {-1.0, 1.0}
    assert {float(envs.make(name).sample_tasks(6, rng).sum()) for _ in range(20)} > {0.0}


OTHER_WORDS = {
    "protocol": ("paper", "gymnasium"),
    "observation": ("paper", "gymnasium"),
    "velocity_of": ("root", "center-of-mass"),
    "position_noise_shape": ("normal", "uniform"),
    "start_pose": ("init_qpos", "qpos0"),
    "contact": ("soft", "file"),
}


def other_value(name: str, value: object) -> object:
    """A value that a field may take besides its own."""
    if isinstance(value, str):
        return next(word for word in OTHER_WORDS[name] if word != value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, tuple):
        return (value[0] / 2, *value[1:])
    assert isinstance(value, float)
    return value / 2 if value else 0.25


def test_returns_compare_unless_a_setting_changes_them(family: TaskFamily) -> None:
    """Every field tells families apart but those that only say which tasks training draws; and
    these change no bit of an episode."""
    plan = make_plan(family)
    with family.make_worlds(WORLDS, threads=1) as worlds:
        expected = trace(worlds, plan)
    assert family.comparable(dataclasses.replace(family))
    fields = {f.name: getattr(family, f.name) for f in dataclasses.fields(family)}
    assert set(fields) > family.training_fields
    for name, value in fields.items():
        other = envs.make(family.name, **{**fields, name: other_value(name, value)})
        for one, two in ((family, other), (other, family)):
            assert one.comparable(two) == (name in family.training_fields), name
        if name in family.training_fields:
            with other.make_worlds(WORLDS, threads=1) as worlds:
                assert trace(worlds, plan) == expected, name


def test_returns_of_two_families_never_compare() -> None:
    """Nor those of one derived from another, whose reward may be another."""

    class Derived(envs.Navigation2D):
        """Of the same name and fields."""

    made = [*(envs.make(name) for name in envs.FAMILIES), Derived()]
    for i, one in enumerate(made):
        assert [one.comparable(other) for other in made] == [i == j for j in range(len(made))]


def test_tasks_that_training_never_draws() -> None:
    """Beyond a bound, and not at it; no direction is, and what is drawn never is."""
    goals = np.array([[0.5, -0.5], [0.0, 0.51], [-0.51, 0.0], [0.1, 0.2]], np.float32)
    found = envs.make("navigation").outside_training(goals)
    assert found.tolist() == [False, True, True, False]
    speeds = np.array([[0.4], [0.39], [1.1], [1.11], [-0.7]], np.float32)
    for name in ("half_cheetah_vel", "ant_vel"):
        family = envs.make(name, speed_low=0.4, speed_high=1.1)
        assert family.outside_training(speeds).tolist() == [False, True, False, True, True]
    directions = envs.make("ant_dir").outside_training(np.array([[1.0], [-1.0]], np.float32))
    assert directions.tolist() == [False, False]


def test_what_is_drawn_is_not_outside_of_training(family: TaskFamily) -> None:
    drawn = family.sample_tasks(50, np.random.default_rng(8))
    assert not family.outside_training(drawn).any()
