"""Figures of supervised tests: what each shows, read from the artists that draw it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

mpl = pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")

from matplotlib.axes import Axes  # noqa: E402  # only where it is installed
from matplotlib.figure import Figure  # noqa: E402  # likewise

from maml_rl.errors import RunStopped  # noqa: E402
from maml_rl.runs import read_metrics  # noqa: E402
from maml_rl.supervised import evaluate, figures  # noqa: E402
from maml_rl.supervised.close_ups import Pictured, fits_of, pictured  # noqa: E402
from maml_rl.supervised.config import load_experiment  # noqa: E402
from maml_rl.supervised.drawn_characters import draw_characters  # noqa: E402
from maml_rl.supervised.evaluate import Outcome, Subject, load_subjects  # noqa: E402
from maml_rl.supervised.looks import panels_of, range_of  # noqa: E402
from maml_rl.supervised.train import meta_train  # noqa: E402
from tests.conftest import files_at_most  # noqa: E402

SINUSOID = {
    "iterations": 5,
    "record_every": 2,
    "threads": 1,
    "network__layers": [7, 6],
    "evaluation__tasks": 9,
    "evaluation__steps": 3,
    "evaluation__query": 8,
    "evaluation__validation_tasks": 4,
}
NO_STEPS = {"adaptation__inner_steps": 0}
ORACLE = {**NO_STEPS, "data__observe_task": True}


@pytest.fixture(scope="module")
def sinusoids(tmp_path_factory: pytest.TempPathFactory) -> list[Subject]:
    """A meta-trained network, a pretrained one and an oracle."""
    folder = tmp_path_factory.mktemp("sinusoids")
    for name, changed in (("a-maml", {}), ("b-pretrained", NO_STEPS), ("c-oracle", ORACLE)):
        meta_train(load_experiment("sinusoid", **{**SINUSOID, **changed}), out=folder / name)
    return load_subjects(sorted(folder.iterdir()))


@pytest.fixture(scope="module")
def tested(sinusoids: list[Subject]) -> list[Outcome]:
    """Their tests with 5 and with 10 points."""
    settings = sinusoids[0].experiment.evaluation
    return [one for subject in sinusoids for one in evaluate.outcomes_of(subject, settings)]


@pytest.fixture(scope="module")
def characters(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """A test of a network for drawn characters: 3 ways, 2 shots."""
    folder = tmp_path_factory.mktemp("characters")
    draw_characters(folder / "images", characters=10, drawings=4)
    file = folder / "few.yaml"
    file.write_text(
        f"name: few\ndata: {{name: drawn_characters, root: '{folder / 'images'}', ways: 3, "
        "shots: 2, train_classes: 4, validation_classes: 3}\niterations: 2\nrecord_every: 1\n"
        "threads: 1\nnetwork: {kind: strided-conv, filters: 3}\nouter: {tasks: 2}\n"
        "evaluation: {steps: 2, tasks: 4, validation_tasks: 2}\n"
    )
    meta_train(load_experiment(file), out=folder / "few-seed0")
    (subject,) = load_subjects([folder / "few-seed0"])
    return next(evaluate.outcomes_of(subject, subject.experiment.evaluation))


def with_scores(one: Outcome, means: Sequence[float]) -> Outcome:
    """A test of the same network in which tasks scatter by 0.01 about each mean."""
    scatter = 0.01 * np.array([-1.0, 0.0, 1.0])
    return replace(one, scores=np.array(means)[:, None] + scatter)


def line(axes: Axes, label: str) -> np.ndarray:
    """The points (N, 2) of the line of a name."""
    (found,) = [one for one in axes.get_lines() if one.get_label() == label]
    return np.asarray(found.get_xydata())


def labels(figure: Figure) -> list[str]:
    """What the legend of a figure names."""
    (legend,) = figure.legends
    return [text.get_text() for text in legend.get_texts()]


def bars(axes: Axes) -> list[np.ndarray]:
    """The intervals of each line, each (N, 2, 2)."""
    return [np.array(one.get_segments()) for one in axes.collections]  # type: ignore[attr-defined]  # of vlines


def words(path: Path) -> str:
    """The words of an SVG."""
    return "\n".join(re.findall(r">([^<>]+)</(?:text|tspan)>", path.read_text(encoding="utf-8")))


def test_scores_stand_at_their_steps_with_their_intervals(tested: list[Outcome]) -> None:
    """A panel a number of points; mean of nine tasks, and 1.96 sd / 3 to either side."""
    figure = figures.steps_figure(tested)
    assert [axes.get_title() for axes in figure.axes] == ["5 points", "10 points"]
    for axes, one in zip(figure.axes, tested[:2], strict=True):
        found = line(axes, "maml")
        assert np.round(found[:, 0]).tolist() == [0, 1, 2, 3]
        np.testing.assert_allclose(found[:, 1], one.scores.mean(1))
        half = 1.96 * one.scores.std(1) / 3
        first = bars(axes)[0]
        np.testing.assert_allclose(first[:, 1, 1] - found[:, 1], half)
        np.testing.assert_allclose(found[:, 1] - first[:, 0, 1], half)


def test_an_oracle_is_a_line_across(tested: list[Outcome]) -> None:
    """It takes no step, and is drawn from the first to the last of the others'."""
    found = line(figures.steps_figure(tested).axes[0], "oracle")
    assert np.round(found[:, 0]).tolist() == [0, 3]
    assert len(set(found[:, 1])) == 1


def test_the_papers_scores_stand_beside_ours(tested: list[Outcome]) -> None:
    """From 5 points, .67 after one step and 2.41 pretrained; none of more steps than ours, and
    none from 10 points, of which it says nothing."""
    first, second = figures.steps_figure(tested).axes
    assert line(first, "maml, the paper's").tolist() == [[1, 0.67]]
    assert line(first, "pretrained, the paper's").tolist() == [[1, 2.41]]
    assert not [one for one in second.get_lines() if "paper" in str(one.get_label())]
    alone = figures.steps_figure(tested[:2])
    assert labels(alone) == ["maml", "maml, the paper's"]


@pytest.mark.parametrize("bad", [1e27, np.inf, np.nan])
def test_a_diverged_network_does_not_ruin_the_picture(tested: list[Outcome], bad: float) -> None:
    """The others stay readable, its name says so, and an arrow at the top shows where."""
    fine, fallen = with_scores(tested[0], [3.0, 1.0, 0.5, 0.4]), tested[2]
    assert fallen.subject.method == "pretrained"
    fallen = with_scores(fallen, [3.1, 2.9, bad, bad])
    figure = figures.steps_figure([fine, fallen])
    (axes,) = figure.axes
    low, high = axes.get_ylim()
    assert 0 <= low < 0.4
    assert 3.1 < high < 10
    name = "pretrained (rises to 1e+27)" if bad == 1e27 else "pretrained (diverges)"
    assert labels(figure)[:2] == ["maml", name]
    arrows = [np.asarray(one.get_xydata()) for one in axes.get_lines() if one.get_marker() == "^"]
    assert np.round(arrows[0][:, 0]).tolist() == [2, 3]
    assert (arrows[0][:, 1] == high).all()


def test_errors_that_lie_far_apart_have_a_logarithmic_axis(tested: list[Outcome]) -> None:
    """An oracle at .01 beside 3; without it the axis is plain."""
    others = [with_scores(tested[0], [3.0, 1.0, 0.7, 0.6])]
    told = with_scores(tested[4], [0.02])
    assert told.subject.method == "oracle"
    (plain,) = figures.steps_figure(others).axes
    (log,) = figures.steps_figure([*others, told]).axes
    assert (plain.get_yscale(), log.get_yscale()) == ("linear", "log")
    low, high = log.get_ylim()
    assert 0 < low < 0.02
    assert 3 < high < 10
    assert "0.1" in [text.get_text() for text in log.get_yticklabels()]


@pytest.mark.slow
def test_both_kinds_of_batch_normalisation_are_told_apart(characters: Outcome) -> None:
    """By style and name; accuracies are percent."""
    first = with_scores(characters, [0.3, 0.6, 0.7])
    second = replace(with_scores(characters, [0.3, 0.5, 0.5]), statistics="support")
    figure = figures.steps_figure([first, second])
    assert labels(figure) == ["maml, query's statistics", "maml, support's statistics"]
    (axes,) = figure.axes
    assert line(axes, "maml, query's statistics")[:, 1] == pytest.approx([30, 60, 70])
    assert axes.get_ylabel() == "accuracy (%)"
    assert len({one.get_linestyle() for one in axes.get_lines()}) == 2


def test_step_sizes_and_runs_have_names_of_their_own(tested: list[Outcome]) -> None:
    """Two step sizes of one network, and another run of its method."""
    one = tested[0]
    other = replace(one, subject=replace(one.subject, path=one.subject.path.parent / "d-maml"))
    several = [one, replace(one, step_size=0.5), other]
    (axes,) = figures.steps_figure(several).axes
    names = [str(one.get_label()) for one in axes.get_lines()]
    assert names[:3] == ["a-maml, step size 0.001", "a-maml, step size 0.5", "d-maml"]
    first, second, third = axes.get_lines()[:3]
    assert first.get_color() == second.get_color() != third.get_color()
    assert first.get_linestyle() != second.get_linestyle()
    assert first.get_marker() != third.get_marker()


def test_fits_are_of_one_curve_and_its_points(tested: list[Outcome]) -> None:
    """Points lie on the curve, in the upper half where it says so; the same for every network; the
    network after steps is that of `LearnedNetwork.adapt`."""
    rows = fits_of(tested)
    assert [row.name for row in rows] == ["maml", "pretrained", "oracle"]
    for row in rows:
        assert [(fit.shots, fit.half) for fit in row.fits] == [
            *((5, False), (10, False), (5, True), (10, True))
        ]
        for fit, first in zip(row.fits, rows[0].fits, strict=True):
            assert len(fit.x) == fit.shots
            np.testing.assert_allclose(np.interp(fit.x, fit.grid, fit.true), fit.y, atol=0.02)
            assert (fit.x >= (0 if fit.half else -5)).all()
            assert fit.half or (fit.x < 0).any()
            assert np.array_equal(fit.true, first.true)
            assert np.array_equal(fit.x, first.x)
            assert (fit.grid[0], fit.grid[-1]) == (-5, 5)
    assert [list(row.fits[0].networks) for row in rows] == [[0, 1, 3], [0, 1, 3], [0]]
    fit = rows[0].fits[0]
    for steps in (0, 1, 3):
        adapted = rows[0].outcome.subject.learned.adapt(fit.x[:, None], fit.y[:, None], steps=steps)
        expected = adapted(fit.grid[:, None])[:, 0]
        np.testing.assert_allclose(fit.networks[steps], expected, rtol=1e-4, atol=1e-5)


def test_a_fit_uses_the_step_size_of_its_test(tested: list[Outcome]) -> None:
    """Twice the step: one step goes twice as far in the output layer's bias, hence elsewhere."""
    (slow,), (fast,) = fits_of(tested[:1]), fits_of([replace(tested[0], step_size=0.002)])
    assert np.array_equal(slow.fits[0].networks[0], fast.fits[0].networks[0])
    assert not np.allclose(slow.fits[0].networks[1], fast.fits[0].networks[1])


def test_the_picture_of_fits_has_a_row_a_network(tested: list[Outcome]) -> None:
    rows = fits_of(tested)
    figure = figures.fits_figure(rows)
    assert figure is not None
    assert len(figure.axes) == 3 * 4
    axes = figure.axes[1]
    assert axes.get_title() == "10 points"
    np.testing.assert_array_equal(
        line(axes, "points"), np.column_stack([rows[0].fits[1].x, rows[0].fits[1].y])
    )
    np.testing.assert_allclose(line(axes, "after 3 steps")[:, 1], rows[0].fits[1].networks[3])
    assert labels(figure) == [
        *("the curve", "before", "after 1 step", "after 3 steps", "points", "takes no step")
    ]


def test_learning_curves_are_the_metrics(tested: list[Outcome]) -> None:
    """Rows of 2, 4 and 5 iterations: batches, and validation tasks before and after a step."""
    figure = figures.curves_figure(tested)
    assert figure is not None
    first, second, _ = figure.axes
    metrics = read_metrics(tested[0].subject.path / "metrics.csv")
    for name, column in (
        ("training batches", "error"),
        ("validation tasks, before adapting", "validation_error_0"),
        ("validation tasks, after 1 gradient step", "validation_error_1"),
    ):
        found = line(first, name)
        assert found[:, 0].tolist() == [2, 4, 5]
        np.testing.assert_array_equal(found[:, 1], metrics[column])
    assert len(second.get_lines()) == 2
    assert first.get_ylim()[0] <= min(metrics["validation_error_1"])


@pytest.mark.slow
def test_images_show_what_they_are_taken_for(characters: Outcome) -> None:
    """A row of the images to adapt to, then of others before and after, framed right or wrong."""
    tasks = pictured(characters)
    assert len(tasks) == 2
    assert tasks[0].support.shape == tasks[0].query.shape == (3, 2, 28, 28, 1)
    # Ink is black on white paper.
    assert tasks[0].support.mean() > 0.5
    known = tasks[0]._replace(
        guesses={0: np.array([[0, 1], [1, 1], [0, 2]]), 2: np.array(3 * [[2, 2]])}
    )
    assert [known.right(0), known.right(2)] == pytest.approx([4 / 6, 2 / 6])
    figure = figures.examples_figure(characters, [known, known])
    assert figure is not None
    axes = figure.axes[: 6 * 3]
    assert [one.get_xlabel() for one in axes[6:12]] == ["1 ✓", "2 ✓", "1 ✗", "2 ✗", "2 ✓", "3 ✓"]
    assert [one.get_xlabel() for one in axes[12:15]] == ["3 ✗", "3 ✗", "3 ✓"]
    assert axes[6].get_ylabel() == "before:\n67% right"
    assert axes[12].get_ylabel() == "after 2 steps:\n33% right"


@pytest.mark.slow
def test_guesses_are_those_of_the_network(characters: Outcome) -> None:
    """By hand: adapted to the images to adapt to, asked about the others together."""
    task: Pictured = pictured(characters)[1]
    learned = characters.subject.learned
    support, query = (
        1 - np.moveaxis(images, -1, 2).reshape(6, 1, 28, 28)
        for images in (task.support, task.query)
    )
    for steps in (0, 2):
        adapted = learned.adapt(support, np.repeat(range(3), 2), steps=steps)
        found = adapted(query).argmax(1).reshape(3, 2)
        assert np.array_equal(task.guesses[steps], found)


def test_of_other_problems_there_are_no_such_pictures(
    tested: list[Outcome], characters: Outcome
) -> None:
    assert fits_of([characters]) == []
    assert pictured(tested[0]) == []
    assert figures.fits_figure([]) is None
    assert figures.examples_figure(tested[0], []) is None


def test_all_accuracies_are_in_the_picture(characters: Outcome) -> None:
    """Unlike errors: none is so bad that it leaves."""
    one = with_scores(characters, [0.9, 0.3, 0.02])
    found = range_of(panels_of([one]), one.subject.experiment.data)
    assert found.low < 2
    assert 90 < found.high <= 102


def test_a_full_disk_is_a_sentence(tested: list[Outcome], tmp_path: Path) -> None:
    with files_at_most(1000), pytest.raises(RunStopped, match="cannot be written") as stopped:
        figures.draw(tmp_path, tested[:1])
    assert stopped.value.exit_code == 3


@pytest.mark.slow
def test_every_figure_is_drawn_twice_and_the_same_again(
    tested: list[Outcome], characters: Outcome, tmp_path: Path
) -> None:
    """PNG and SVG; the same numbers give the same bytes; pictures of another test do not stay."""
    for outcomes, wanted in (
        (tested, ["steps", "fits", "learning_curves"]),
        ([characters], ["steps", "learning_curves", "examples"]),
    ):
        contents = []
        for _ in range(2):
            assert figures.draw(tmp_path, outcomes) == wanted
            assert {p.name for p in tmp_path.iterdir()} == {
                f"{name}.{kind}" for name in wanted for kind in ("png", "svg")
            }
            contents.append([p.read_bytes() for p in sorted(tmp_path.iterdir())])
        assert contents[0] == contents[1]
    found = words(tmp_path / "steps.svg")
    assert all(word in found for word in ("gradient steps", "accuracy (%)", "2 shots"))
