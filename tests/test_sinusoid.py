"""Sine curves: the values, where they are drawn, and what is told of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from maml_rl.supervised.sinusoid import Curves, Sinusoid
from maml_rl.supervised.tasks import Batch, Split

M, SHOTS, QUERY = 300, 4, 7


def draw(
    problem: Sinusoid, seed: int = 2, split: Split = "train", query: int | None = None
) -> Batch:
    return problem.open().sample(split, M, np.random.default_rng(seed), query=query)


def test_values_by_hand() -> None:
    """2 sin(x - pi / 6) and 5 sin(x - pi / 2), each at its own x."""
    curves = Curves(np.array([2.0, 5.0]), np.array([math.pi / 6, math.pi / 2]))
    x = np.array([[math.pi / 6, 2 * math.pi / 3, 0.0], [0.0, math.pi / 2, math.pi]])
    expected = [[0.0, 2.0, -1.0], [-5.0, 0.0, 5.0]]
    np.testing.assert_allclose(curves.values(x), expected, atol=1e-12)


@pytest.mark.parametrize("observe_task", [False, True])
def test_shapes(observe_task: bool) -> None:
    """Sizes all different; of the query, the problem's or those asked for."""
    problem = Sinusoid(shots=SHOTS, query=QUERY, observe_task=observe_task)
    columns = 3 if observe_task else 1
    assert (problem.input_shape, problem.outputs, problem.classifies) == ((columns,), 1, False)
    for query, count in ((None, QUERY), (9, 9)):
        support, judged = draw(problem, query=query)
        assert support.inputs.shape == (M, SHOTS, columns)
        assert support.targets.shape == (M, SHOTS, 1)
        assert judged.inputs.shape == (M, count, columns)
        assert judged.targets.shape == (M, count, 1)
        for tensor in (*support, *judged):
            assert tensor.dtype == torch.float32
            assert not tensor.requires_grad


def test_what_is_told_of_a_task_is_its_curve() -> None:
    """x, amplitude, phase: y = amplitude sin(x - phase) in every row, of support and query."""
    problem = Sinusoid(shots=SHOTS, query=QUERY, observe_task=True)
    support, query = draw(problem)
    for part in (support, query):
        x, amplitude, phase = part.inputs.double().unbind(2)
        expected = amplitude * torch.sin(x - phase)
        torch.testing.assert_close(part.targets[..., 0].double(), expected, rtol=0, atol=1e-5)
        # The same for all of a task's points, and that of the task's support.
        for column in (1, 2):
            told = support.inputs[:, :1, column].expand(part.inputs.shape[:2])
            assert torch.equal(part.inputs[..., column], told)
    # Told or not, the same curves and points are drawn.
    plain = draw(Sinusoid(shots=SHOTS, query=QUERY))
    for part, other in zip((support, query), plain, strict=True):
        assert torch.equal(part.inputs[..., :1], other.inputs)
        assert torch.equal(part.targets, other.targets)


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"amplitude": (2.0, 3.0)},
        {"phase": (-1.0, 0.5)},
        {"x": (1.0, 1.5)},
    ],
)
def test_draws_fill_their_ranges(changed: dict[str, tuple[float, float]]) -> None:
    """The paper's [.1, 5], [0, pi], [-5, 5] or those asked for: uniform, and to both ends.

    Of n uniform numbers the mean lies within 4 / sqrt(12 n) of the middle, in units of the range,
    and nothing of the outer 2 % at an end is left with odds of .98^300 = .002.
    """
    problem = Sinusoid(shots=SHOTS, query=QUERY, observe_task=True, **changed)
    paper = {"x": (-5.0, 5.0), "amplitude": (0.1, 5.0), "phase": (0.0, math.pi)}
    support, query = draw(problem)
    everything = torch.cat([support.inputs, query.inputs], 1)
    for column, name in enumerate(("x", "amplitude", "phase")):
        low, high = (paper | changed)[name]
        values = everything[..., column] if name == "x" else everything[:, 0, column]
        places = (values.double().flatten() - low) / (high - low)
        assert -1e-6 <= places.min() < 0.02
        assert 0.98 < places.max() <= 1 + 1e-6
        assert float(places.mean()) == pytest.approx(0.5, abs=4 / math.sqrt(12 * len(places)))


def test_tasks_and_points_are_all_different() -> None:
    """No curve twice; no point of the support is one of the query, nor another task's."""
    support, query = draw(Sinusoid(shots=SHOTS, query=QUERY, observe_task=True))
    assert len(set(support.inputs[:, 0, 1].tolist())) == M
    assert len(set(support.inputs[:, 0, 2].tolist())) == M
    points = torch.cat([support.inputs, query.inputs], 1)[..., 0]
    assert all(len(set(row.tolist())) == SHOTS + QUERY for row in points)
    assert len(set(points[:, 0].tolist())) == M


def test_a_generator_decides_the_tasks() -> None:
    """The same one the same, another others; splits differ by their generators alone."""
    problem = Sinusoid(shots=SHOTS, query=QUERY)
    first = draw(problem)
    for same in (draw(problem), draw(problem, split="test")):
        assert all(torch.equal(a, b) for a, b in zip(first.support, same.support, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(first.query, same.query, strict=True))
    assert not torch.equal(first.support.inputs, draw(problem, seed=3).support.inputs)
    # A generator goes on.
    rng, source = np.random.default_rng(2), problem.open()
    one, two = (source.sample("train", M, rng) for _ in range(2))
    assert torch.equal(one.support.inputs, first.support.inputs)
    assert not torch.equal(two.support.inputs, first.support.inputs)


def test_every_split_has_curves() -> None:
    assert Sinusoid().open().splits == ("train", "validation", "test")


def test_the_defaults_are_the_papers() -> None:
    problem = Sinusoid()
    assert (problem.name, problem.shots, problem.query) == ("sinusoid", 10, 10)
    assert not problem.observe_task


@pytest.mark.parametrize("name", ["amplitude", "phase", "x"])
@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((2.0, 2.0), "2 and 2"),
        ((3.0, 1.0), "3 and 1"),
        ((math.nan, 1.0), "nan and 1"),
        ((0.0, math.inf), "0 and inf"),
        ((-2e6, 1.0), r"-2e\+06 and 1"),
    ],
)
def test_a_range_that_is_none_is_refused(name: str, given: tuple[float, float], said: str) -> None:
    words = (
        rf"^data\.{name} must be two numbers from -1e\+06 to 1e\+06, the lower first, got {said}$"
    )
    with pytest.raises(ValueError, match=words):
        Sinusoid(**{name: given})  # type: ignore[arg-type]  # by name


@pytest.mark.parametrize("name", ["shots", "query"])
@pytest.mark.parametrize(
    ("given", "words"), [(0, "at least 1, got 0"), (100_001, "at most 100000, got 100001")]
)
def test_numbers_of_points_that_cannot_be_are_refused(name: str, given: int, words: str) -> None:
    with pytest.raises(ValueError, match=f"^data.{name} must be {words}$"):
        Sinusoid(**{name: given})  # type: ignore[arg-type]  # by name
