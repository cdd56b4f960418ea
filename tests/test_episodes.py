"""Packing, against loops over tasks, episodes and steps; whatever a dead step holds is 99."""

from __future__ import annotations

import pytest
import torch

from maml_rl.episodes import Episodes, Steps, pack

M, E, H, O, A, Q = 2, 3, 4, 5, 6, 7  # noqa: E741  # the page's letter
POISON = 99.0

UNEVEN = ((2, 4, 1), (3, 0, 2))
"""Steps of each episode; task 1's second slot holds no episode."""


def make_episodes(lengths: tuple[tuple[int, ...], ...]) -> Episodes:
    """Every live entry says where it is: task, episode, step and column; every dead one is 99."""
    alive = torch.zeros(M, E, H, dtype=torch.bool)
    for task, row in enumerate(lengths):
        for episode, length in enumerate(row):
            alive[task, episode, :length] = True
    place = (
        1000.0 * (1 + torch.arange(M)[:, None, None])
        + 200.0 * torch.arange(E)[:, None]
        + 20.0 * torch.arange(H)
    )

    def coded(columns: int) -> torch.Tensor:
        values = place.unsqueeze(-1) + torch.arange(columns)
        return torch.where(alive.unsqueeze(-1), values, POISON)

    return Episodes(
        observations=coded(O),
        actions=coded(A) + 0.25,
        rewards=torch.where(alive, place + 0.5, POISON),
        alive=alive,
        log_probs=torch.where(alive, place + 0.75, POISON),
        measures=coded(Q) + 0.125,
        diverged=torch.zeros(M, E, dtype=torch.bool),
    )


def check_packed(lengths: tuple[tuple[int, ...], ...]) -> Steps:
    """Compare with what a loop over tasks, episodes and steps gathers; return the steps."""
    episodes = make_episodes(lengths)
    advantages = torch.where(episodes.alive, episodes.rewards - 0.0625, POISON)
    steps = pack(episodes, advantages)
    S = max(sum(row) for row in lengths)
    assert [tuple(t.shape) for t in steps] == [(M, S, O), (M, S, A), (M, S), (M, S), (M, S), (M, S)]
    for m, row in enumerate(lengths):
        at = 0
        for e, length in enumerate(row):
            first = at
            for t in range(length):
                assert torch.equal(steps.observations[m, at], episodes.observations[m, e, t])
                assert torch.equal(steps.actions[m, at], episodes.actions[m, e, t])
                assert steps.advantages[m, at] == advantages[m, e, t]
                assert steps.log_probs[m, at] == episodes.log_probs[m, e, t]
                assert steps.weights[m, at] == torch.tensor(1.0) / sum(row)
                assert steps.first[m, at] == first
                at += 1
        assert at == sum(row)
        # Padding: nothing of what dead steps hold, no weight, and an index that can be read.
        for values in (steps.observations, steps.actions, steps.advantages, steps.log_probs):
            assert not values[m, at:].any()
        assert not steps.weights[m, at:].any()
        assert not steps.first[m, at:].any()
    assert not (steps.observations == POISON).any()
    assert not (steps.actions == POISON + 0.25).any()
    torch.testing.assert_close(steps.weights.sum(1), torch.ones(M))
    return steps


def test_live_steps_are_packed_in_order_of_episode_and_time() -> None:
    """Slots of 2, 4, 1 and 3, 0, 2 steps: S = 7; `first` is where each step's episode begins."""
    steps = check_packed(UNEVEN)
    assert steps.first.tolist() == [[0, 0, 2, 2, 2, 2, 6], [0, 0, 0, 3, 3, 0, 0]]


@pytest.mark.parametrize(
    "lengths",
    [
        pytest.param(((4, 4, 4), (1, 4, 2)), id="the first task loses none"),
        pytest.param(((3, 1, 4), (4, 4, 4)), id="the last task loses none"),
        pytest.param(((4, 4, 4), (4, 4, 4)), id="no task loses any"),
        pytest.param(((1, 0, 0), (0, 0, 1)), id="one step each"),
    ],
)
def test_packing_where_some_tasks_have_every_step(lengths: tuple[tuple[int, ...], ...]) -> None:
    """A task without a dead step sets S = E H; the others' dead steps still weigh nothing."""
    check_packed(lengths)


def test_what_dead_steps_hold_changes_no_bit() -> None:
    """Dead entries of 99 and of NaN pack to the same steps."""
    episodes = make_episodes(UNEVEN)
    expected = pack(episodes, episodes.rewards)
    for values in (episodes.observations, episodes.actions, episodes.rewards, episodes.log_probs):
        values[~episodes.alive] = torch.nan
    for one, other in zip(expected, pack(episodes, episodes.rewards), strict=True):
        assert torch.equal(one, other)


def test_weights_take_the_type_of_the_advantages() -> None:
    """Advantages in float64 make weights in float64, 1 / 7 to all its digits."""
    episodes = make_episodes(UNEVEN)
    weights = pack(episodes, episodes.rewards.double()).weights
    assert weights.dtype == torch.float64


def test_a_task_without_a_live_step_is_refused() -> None:
    episodes = make_episodes(((2, 4, 1), (0, 0, 0)))
    with pytest.raises(ValueError, match="a task has no live step"):
        pack(episodes, episodes.rewards)


def test_steps_of_some_tasks() -> None:
    """of_tasks(1, 2) is task 1 alone, its axis kept, without padding for the others."""
    steps = check_packed(UNEVEN)
    for whole, part in zip(steps, steps.of_tasks(1, 2), strict=True):
        assert part.shape == (1, 5, *whole.shape[2:])
        assert torch.equal(part[0], whole[1, :5])
    for whole, part in zip(steps, steps.of_tasks(0, 2), strict=True):
        assert torch.equal(part, whole)


def test_returns_are_sums_over_live_steps() -> None:
    """Undiscounted: task 0 has 1000.5 + 1020.5, four of 1200.5 + 20 t, and 1400.5; an empty slot
    is NaN, and the mean over episodes leaves it out."""
    episodes = make_episodes(UNEVEN)
    returns = episodes.returns()
    assert returns[0].tolist() == [2021.0, 4922.0, 1400.5]
    assert returns[1].nan_to_num(-1.0).tolist() == [6061.5, -1.0, 4821.0]
    torch.testing.assert_close(
        episodes.mean_returns(), torch.tensor([8343.5 / 3, (6061.5 + 4821.0) / 2])
    )
    assert episodes.live_steps.tolist() == [7, 5]


def test_measures_are_means_over_live_steps() -> None:
    """Over a task's live steps pooled, not over the means of its episodes."""
    episodes = make_episodes(UNEVEN)
    base = [
        (1000 + 1020 + 1200 + 1220 + 1240 + 1260 + 1400) / 7,
        (2000 + 2020 + 2040 + 2400 + 2420) / 5,
    ]
    expected = torch.tensor([[b + q + 0.125 for q in range(Q)] for b in base])
    torch.testing.assert_close(episodes.mean_measures(), expected)
