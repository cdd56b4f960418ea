"""Held-out evaluation: which tasks, which step sizes, which numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from envs.ant import AntVel
from envs.family import TaskFamily
from envs.half_cheetah import HalfCheetahDir, HalfCheetahVel
from envs.navigation import Navigation2D
from maml_rl.adapt import Params, broadcast
from maml_rl.advantages import AdvantageSettings, estimate_advantages
from maml_rl.chunks import Chunks
from maml_rl.episodes import Episodes, pack
from maml_rl.evaluate import (
    Evaluation,
    EvaluationSettings,
    adapt_to_tasks,
    evaluate,
    step_sizes,
)
from maml_rl.maml import AdaptationSettings
from maml_rl.policy import GaussianPolicy, PolicySettings, make_policy
from maml_rl.sampler import Sampler, task_generator, task_seeds
from maml_rl.seeds import TEST, TEST_SEED, TRAINING
from maml_rl.task_sets import TaskSet, held_out

FAMILY = Navigation2D(horizon=6, goal_radius=0.05)
SETTINGS = EvaluationSettings(tasks=4, episodes=3, steps=2)


pytestmark = pytest.mark.usefixtures("one_torch_thread")


def policy_of(family: TaskFamily) -> tuple[GaussianPolicy, Params]:
    policy = make_policy(
        PolicySettings(layers=(5,)), len(family.observation_columns), len(family.action_columns)
    )
    return policy, policy.initial_parameters(1)


def run(
    family: TaskFamily = FAMILY,
    *,
    settings: EvaluationSettings = SETTINGS,
    inner_steps: int = 1,
    step_size: float = 0.2,
    action_scale: float = 1.0,
    threads: int = 1,
    tasks: TaskSet | None = None,
    see: Callable[[Params, Episodes], object] = lambda _, __: None,
) -> Evaluation:
    policy, theta = policy_of(family)
    return evaluate(
        policy,
        theta,
        family,
        settings=settings,
        adaptation=AdaptationSettings(inner_steps=inner_steps, step_size=step_size),
        advantages=AdvantageSettings(),
        action_scale=action_scale,
        threads=threads,
        tasks=tasks,
        see=see,
    )


def check_same(one: Evaluation, other: Evaluation) -> None:
    for name in ("tasks", "returns", "return_sds", "measures"):
        assert np.array_equal(getattr(one, name), getattr(other, name)), name


@pytest.mark.parametrize("family", [FAMILY, HalfCheetahVel(), AntVel()], ids=lambda f: f.name)
def test_test_tasks_are_always_the_same_and_none_is_trained_on(family: TaskFamily) -> None:
    """They depend on nothing but the family; more of them begin with the fewer; and no run seed's
    training tasks share one with them."""
    tasks = held_out(family, 7).tasks
    assert tasks.shape == (7, len(family.task_columns))
    np.random.seed(0)  # The global state must not matter.
    assert np.array_equal(held_out(family, 7).tasks, tasks)
    assert len(np.unique(tasks, axis=0)) == 7
    tested = set(map(tuple, tasks.tolist()))
    for seed in (0, 1, TEST_SEED):
        for iteration in range(5):
            drawn = family.sample_tasks(7, task_generator(TRAINING, seed, iteration))
            assert not tested & set(map(tuple, drawn.tolist()))


@pytest.mark.parametrize(("count", "each"), [(4, 2), (5, 3), (1, 1)])
def test_finite_families_use_each_task_equally_often(count: int, each: int) -> None:
    """The count is rounded up to a multiple of the family's tasks."""
    tasks = held_out(HalfCheetahDir(), count).tasks
    assert sorted(tasks[:, 0].tolist()) == [-1.0] * each + [1.0] * each


@pytest.mark.parametrize(
    ("inner_steps", "expected"),
    [(0, [0.4, 0.1, 0.1, 0.1]), (1, [0.4, 0.1, 0.1, 0.1]), (3, [0.4, 0.4, 0.4, 0.1])],
)
def test_step_sizes_fall_after_the_steps_trained_for(
    inner_steps: int, expected: list[float]
) -> None:
    """alpha for the first max(1, inner_steps) updates, then alpha times later_step_scale."""
    sizes = step_sizes(
        AdaptationSettings(inner_steps=inner_steps, step_size=0.4),
        EvaluationSettings(steps=4, later_step_scale=0.25),
    )
    assert sizes == expected


def evaluation(tasks: list[float], returns: list[float]) -> Evaluation:
    """One gradient step that adds 100 to the returns of every other task."""
    plain = np.array(returns)
    later = plain + np.where(np.arange(len(returns)) % 2, 100.0, 0.0)
    rows = np.stack([plain, later])
    wanted = np.array(tasks, np.float32)[:, None]
    return Evaluation(wanted, rows, np.zeros_like(rows), rows[..., None], 3)


def test_repetitions_of_a_finite_familys_tasks_are_told_apart() -> None:
    """By mask, in words; a family of infinitely many tasks has no groups."""
    result = evaluation([-1.0, 1.0, -1.0, 1.0, -1.0], [1.0, 100.0, 3.0, 102.0, 5.0])
    groups = {words: mask.tolist() for words, mask in result.groups(HalfCheetahDir())}
    assert groups == {
        "backward": [True, False, True, False, True],
        "forward": [False, True, False, True, False],
    }
    assert list(result.groups(HalfCheetahVel())) == []


@pytest.mark.parametrize("inner_steps", [0, 1])
def test_evaluating_twice_gives_the_same_numbers(inner_steps: int) -> None:
    """A policy meta-trained with inner steps or without: returns after 0, 1 and 2 gradient steps,
    to the bit, on any number of threads."""
    one = run(inner_steps=inner_steps)
    assert one.returns.shape == one.return_sds.shape == (3, 4)
    assert one.measures.shape == (3, 4, 1)
    assert one.episodes == 3
    assert np.isfinite(one.returns).all()
    assert len({row.tobytes() for row in one.returns}) == 3
    check_same(one, run(inner_steps=inner_steps))
    check_same(one, run(inner_steps=inner_steps, threads=2))


def test_episodes_are_of_the_test_stream_and_figures_are_theirs() -> None:
    """Step 0 by hand: the sampler with seeds (TEST, TEST_SEED, 0, 0), mean and sd (divisor n) of
    each task's returns over episodes, measures over live steps."""
    result = run()
    policy, theta = policy_of(FAMILY)
    assert np.array_equal(result.tasks, held_out(FAMILY, 4).tasks)
    with Sampler(FAMILY, policy, tasks=4, episodes=3) as sampler:
        episodes = sampler.sample(
            broadcast(theta, 4),
            torch.from_numpy(result.tasks),
            task_seeds(TEST, TEST_SEED, 0, 0, 4),
        )
    for task in range(4):
        returns = [
            float(episodes.rewards[task, e][episodes.alive[task, e]].sum()) for e in range(3)
        ]
        assert math.isclose(result.returns[0, task], np.mean(returns), rel_tol=1e-5)
        assert math.isclose(result.return_sds[0, task], np.std(returns), rel_tol=1e-4)
        distance = episodes.measures[task][episodes.alive[task]].mean()
        assert math.isclose(result.measures[0, task, 0], float(distance), rel_tol=1e-5)


def test_counted_in_steps_a_task_has_whole_episodes_until_its_steps_are_full() -> None:
    """K episodes of a point that arrives are short; counted in steps, as the paper did, figures and
    updates have K H live steps of every task, and the first K episodes are the same."""
    family = Navigation2D(horizon=30, goal_radius=0.25)
    first: list[Episodes] = []
    second: list[Episodes] = []
    by_episodes = run(family, see=lambda _, episodes: first.append(episodes))
    by_steps = run(
        family,
        settings=replace(SETTINGS, count="steps"),
        see=lambda _, episodes: second.append(episodes),
    )
    for few, many in zip(first, second, strict=True):
        assert few.alive.shape[1] == 3
        assert bool((few.live_steps < 3 * 30).any())
        assert bool((many.live_steps >= 3 * 30).all())
    assert torch.equal(first[0].rewards, second[0].rewards[:, :3])
    assert by_steps.episodes == by_episodes.episodes == 3
    policy, theta = policy_of(family)
    with Sampler(family, policy, tasks=4, episodes=3, count="steps") as sampler:
        seeds = task_seeds(TEST, TEST_SEED, 0, 0, 4)
        alike = sampler.sample(broadcast(theta, 4), torch.from_numpy(by_steps.tasks), seeds)
    assert np.array_equal(by_steps.returns[0], alike.mean_returns().double().numpy())
    assert not np.array_equal(by_steps.returns[1], by_episodes.returns[1])


def test_a_tasks_numbers_do_not_depend_on_the_other_tasks() -> None:
    """The first two tasks alone give what they give among four."""
    whole = run()
    part = run(tasks=TaskSet("chosen", whole.tasks[:2]))
    check_same(
        part,
        Evaluation(
            whole.tasks[:2],
            whole.returns[:, :2],
            whole.return_sds[:, :2],
            whole.measures[:, :2],
            3,
        ),
    )


def test_measures_are_shown_the_wanted_way() -> None:
    """A direction family's velocity counts backward for a backward task: at step 0 the return is
    d times velocity less control cost, so measure = d v."""
    family = HalfCheetahDir(horizon=5, control_cost=0.0)
    result = run(family, settings=EvaluationSettings(tasks=2, episodes=3, steps=0))
    assert result.returns.shape == (1, 2)
    np.testing.assert_allclose(result.measures[0, :, 0], result.returns[0] / 5, rtol=1e-4)


def test_the_action_scale_reaches_the_body() -> None:
    """An action of 10 as the bound moves a tenth as far, so returns differ."""
    assert not np.array_equal(run().returns[0], run(action_scale=10.0).returns[0])


def test_each_update_learns_from_the_episodes_before_it() -> None:
    """theta_k+1 = theta_k - size_k grad L on the episodes that came with theta_k; after the last
    update there are none unless asked for. Episodes of each step are of that step's phase."""
    policy, theta = policy_of(FAMILY)
    tasks = held_out(FAMILY, 3).tasks
    sizes = [0.5, 0.125]
    adaptation = AdaptationSettings(step_size=99.0, inner_loss="dice")
    chunks = Chunks(1)
    with Sampler(FAMILY, policy, tasks=3, episodes=4) as sampler:
        found = list(
            adapt_to_tasks(
                policy,
                theta,
                sampler,
                tasks,
                adaptation=adaptation,
                advantages=AdvantageSettings(),
                sizes=sizes,
                stream=TRAINING,
                seed=8,
                chunks=chunks,
                last=False,
            )
        )
        assert len(found) == 3
        assert found[2][1] is None
        for k, size in enumerate(sizes):
            params, episodes = found[k]
            assert episodes is not None
            again = sampler.sample(
                params, torch.from_numpy(tasks), task_seeds(TRAINING, 8, 0, k, 3)
            )
            assert torch.equal(again.actions[again.alive], episodes.actions[episodes.alive])
            advantages, _ = estimate_advantages(episodes, AdvantageSettings())
            inner = adaptation.inner_step(policy, size)
            expected = inner(params, pack(episodes, advantages))
            for name, p in expected.items():
                torch.testing.assert_close(found[k + 1][0][name], p, rtol=1e-5, atol=1e-6)
                assert (p - params[name]).abs().max() > 1e-4
    chunks.close()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tasks": 0}, "evaluation.tasks must be at least 1, got 0"),
        ({"episodes": 0}, "evaluation.episodes must be at least 1, got 0"),
        ({"steps": -1}, "evaluation.steps must be at least 0, got -1"),
        ({"later_step_scale": 0.0}, "evaluation.later_step_scale must be above 0, got 0.0"),
        ({"later_step_scale": math.nan}, "evaluation.later_step_scale must be above 0, got nan"),
    ],
)
def test_settings_out_of_range_are_refused(fields: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EvaluationSettings(**fields)  # type: ignore[arg-type]  # wrong on purpose
