"""Test tasks: the right ones, always the same, and wrong ones refused in a sentence."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest

import envs
from envs.family import FamilyError
from maml_rl.sampler import task_generator, task_seeds
from maml_rl.seeds import TEST_SEED, TRAINING
from maml_rl.task_sets import between, chosen, held_out, papers_own, validation


def test_the_papers_tasks_are_those_of_its_seed() -> None:
    """RandomState(1).uniform: .417022, .720324, 1.1e-4 ... times the range; mean speed .92."""
    speeds = papers_own(envs.make("half_cheetah_vel"))
    assert speeds.source == "paper"
    np.testing.assert_allclose(speeds.tasks[:3, 0], [0.834044, 1.440649, 0.000229], atol=1e-6)
    assert speeds.tasks.mean() == pytest.approx(0.92, abs=0.005)
    assert papers_own(envs.make("ant_vel")).tasks[0, 0] == pytest.approx(3 * 0.417022, abs=1e-5)
    goals = papers_own(envs.make("navigation")).tasks
    np.testing.assert_allclose(goals[0], [-0.082978, 0.220324], atol=1e-6)
    for name, forward in (("half_cheetah_dir", 18), ("ant_dir", 20)):
        directions = papers_own(envs.make(name)).tasks
        assert directions.shape == (40, 1)
        assert int((directions == 1.0).sum()) == forward
        assert int((directions == -1.0).sum()) == 40 - forward


@pytest.mark.parametrize("name", list(envs.FAMILIES))
def test_every_set_is_of_tasks_of_the_family(name: str) -> None:
    family = envs.make(name)
    for tasks in (papers_own(family).tasks, held_out(family, 7).tasks):
        assert tasks.dtype == np.float32
        for task in tasks:
            family.check_task(task)
    assert papers_own(family).tasks.shape == (40, len(family.task_columns))


def test_chosen_tasks_are_read_from_text() -> None:
    """Columns joined by commas, in the order given."""
    assert chosen(envs.make("ant_vel"), ["0.5", "1.5"]).tasks.tolist() == [[0.5], [1.5]]
    goals = chosen(envs.make("navigation"), ["0.25,-0.5"])
    assert (goals.source, goals.tasks.tolist()) == ("chosen", [[0.25, -0.5]])


def test_one_of_finitely_many_tasks_may_be_given_in_words() -> None:
    """As it is called in tables; what is none of them is answered with them."""
    ants = envs.make("ant_dir")
    assert chosen(ants, ["forward", "-1", "backward"]).tasks.tolist() == [[1], [-1], [-1]]
    with pytest.raises(FamilyError, match="a task is backward or forward; got 'north'"):
        chosen(ants, ["north"])


@pytest.mark.parametrize(
    ("family", "text"),
    [
        ("navigation", "0.3"),
        ("navigation", "0.3,0.1,0.2"),
        ("navigation", "nan,0"),
        ("ant_vel", "inf"),
        ("ant_vel", "fast"),
        ("ant_vel", ""),
        ("ant_dir", "0.5"),
    ],
)
def test_what_is_no_task_of_the_family_is_refused(family: str, text: str) -> None:
    """Wrong width, not finite, no number, or none of two."""
    with pytest.raises(FamilyError, match=f"{family}: a task is "):
        chosen(envs.make(family), [text])


def test_tasks_between_bounds_are_in_them_and_always_the_same() -> None:
    """Marked by their bounds; only where a task is one number."""
    family = envs.make("half_cheetah_vel")
    drawn = between(family, 2.0, 3.0, 40)
    assert drawn.source == "from 2 to 3"
    assert drawn.tasks.shape == (40, 1)
    assert 2.0 <= drawn.tasks.min() < 2.2 < 2.8 < drawn.tasks.max() <= 3.0
    assert np.array_equal(drawn.tasks, between(family, 2.0, 3.0, 40).tasks)
    for bounds in ((3.0, 2.0), (2.0, 2.0), (0.0, np.inf), (np.nan, 1.0)):
        with pytest.raises(FamilyError, match="two finite numbers, the lower first"):
            between(family, *bounds, 4)
    for name in ("half_cheetah_dir", "navigation"):
        with pytest.raises(FamilyError, match="whose task is one number"):
            between(envs.make(name), 0.0, 1.0, 4)


def test_the_paper_has_no_tasks_for_families_of_others() -> None:
    family = envs.from_gymnasium(
        lambda: gymnasium.make("Pendulum-v1"),
        lambda count, rng: rng.uniform(0, 1, (count, 1)),
        lambda env, task: None,
        task_names=("gravity",),
    )
    with pytest.raises(FamilyError, match="the paper has no tasks for gymnasium"):
        papers_own(family)


@pytest.mark.parametrize("name", ["navigation", "half_cheetah_vel", "ant_vel"])
def test_nothing_is_chosen_on_tasks_of_the_test_or_of_training(name: str) -> None:
    """Validation tasks are always the same, more of them begin with the fewer, and none is a test
    task, one of the paper's or one that a run draws."""
    family = envs.make(name)
    found = validation(family, 20)
    assert (found.source, found.tasks.shape) == ("validation", (20, len(family.task_columns)))
    assert np.array_equal(validation(family, 7).tasks, found.tasks[:7])
    chosen_on = set(map(tuple, found.tasks.tolist()))
    assert len(chosen_on) == 20
    assert not chosen_on & set(map(tuple, held_out(family, 200).tasks.tolist()))
    assert not chosen_on & set(map(tuple, papers_own(family).tasks.tolist()))
    for seed in (0, 1, TEST_SEED):
        for iteration in range(5):
            drawn = family.sample_tasks(20, task_generator(TRAINING, seed, iteration))
            assert not chosen_on & set(map(tuple, drawn.tolist()))


def test_where_tasks_are_few_validation_has_other_episodes() -> None:
    """Both directions, as in the test; the seeds of their episodes are of another stream."""
    family = envs.make("half_cheetah_dir")
    found, tested = validation(family, 4), held_out(family, 4)
    assert sorted(found.tasks[:, 0].tolist()) == [-1.0, -1.0, 1.0, 1.0]
    seeds = [set(task_seeds(s.stream, TEST_SEED, 0, 0, 4).tolist()) for s in (found, tested)]
    assert not seeds[0] & seeds[1]
    assert not seeds[0] & set(task_seeds(TRAINING, TEST_SEED, 0, 0, 4).tolist())
