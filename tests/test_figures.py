"""The figures: what each shows, read from the artists that draw it and from the SVG's words."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

mpl = pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")

from matplotlib.axes import Axes  # noqa: E402  # only where it is installed
from matplotlib.figure import Figure  # noqa: E402  # likewise

from envs import HalfCheetahDir, HalfCheetahVel, Navigation2D, TaskFamily  # noqa: E402
from maml_rl import figures  # noqa: E402
from maml_rl.assess import (  # noqa: E402
    Subject,
    load_subjects,
    outcomes_of,
    under_settings,
    ways_of,
)
from maml_rl.cli import run  # noqa: E402
from maml_rl.comparison import Method, MethodScores, Outcome, compare  # noqa: E402
from maml_rl.config import load_experiment  # noqa: E402
from maml_rl.evaluate import Evaluation  # noqa: E402
from maml_rl.looks import title  # noqa: E402
from maml_rl.paper import paper_returns  # noqa: E402
from maml_rl.runs import read_metrics  # noqa: E402
from maml_rl.task_sets import held_out, papers_own  # noqa: E402
from maml_rl.train import meta_train  # noqa: E402
from tests.tiny import SETTINGS  # noqa: E402

NAMES = ("returns", "learning_curves", "tasks", "trajectories")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Subject]:
    """Two seeds of a meta-policy, one oracle; of navigation."""
    folder = tmp_path_factory.mktemp("runs")
    told = {"adaptation__inner_steps": 0, "policy__observe_task": True, "iterations": 4}
    for name, changed in (("a-seed0", {}), ("a-seed1", {"seed": 1}), ("oracle-seed0", told)):
        meta_train(load_experiment("navigation", **{**SETTINGS, **changed}), out=folder / name)
    subjects = load_subjects(sorted(folder.iterdir()))
    return under_settings(subjects, subjects[0].trained.experiment.evaluation)


def outcome(
    family: TaskFamily, means: Sequence[float], *, method: Method = "maml", size: float = 0.5
) -> Outcome:
    """A test in which the return of a task is the mean and its number."""
    tasks = papers_own(family).tasks
    returns = np.array(means, np.float64)[:, None] + (np.arange(40, dtype=np.float64) - 19.5)
    zeros = np.zeros((len(means), 40, len(family.measure_columns)))
    found = Evaluation(tasks, returns, returns * 0, zeros, 20)
    return Outcome(method, "", 0, size, "paper", found, family.outside_training(tasks))


def labels(axes: Axes) -> list[str]:
    """What the legend calls the lines."""
    return [str(line.get_label()) for line in axes.get_lines()]


def points(axes: Axes, label: str) -> np.ndarray:
    """The points (N, 2) of one line."""
    line = next(line for line in axes.get_lines() if line.get_label() == label)
    return np.asarray(line.get_xydata())


def heights(axes: Axes, label: str) -> list[float]:
    """The heights of one line."""
    values: list[float] = points(axes, label)[:, 1].tolist()
    return values


def drawn(outcomes: Sequence[Outcome], family: TaskFamily) -> Axes:
    scores = compare(outcomes, family)
    figure = figures.returns_figure(scores, family, outcomes[0].evaluation.tasks)
    return figure.axes[0]


def words(path: Path) -> str:
    """The words of an SVG."""
    return "\n".join(re.findall(r">([^<>]+)</(?:text|tspan)>", path.read_text(encoding="utf-8")))


@pytest.mark.slow
def test_every_figure_is_drawn_twice_and_the_same_again(
    runs: list[Subject], tmp_path: Path
) -> None:
    """PNG and SVG of all four for navigation; the same numbers give the same bytes."""
    tasks = held_out(runs[0].family, 5)
    outcomes = outcomes_of(runs, tasks, {})
    scores = compare(outcomes, runs[0].family)
    ways = ways_of(runs, outcomes, 3)
    contents = []
    for name in ("first", "second"):
        folder = tmp_path / name
        folder.mkdir()
        assert figures.draw(folder, runs, outcomes, scores, ways) == list(NAMES)
        assert {p.name for p in folder.iterdir()} == {
            f"{name}.{kind}" for name in NAMES for kind in ("png", "svg")
        }
        contents.append([p.read_bytes() for p in sorted(folder.iterdir())])
    assert contents[0] == contents[1]
    assert all(c.startswith(b"\x89PNG") for c in contents[0][::2])
    for name, wanted in (
        ("returns", ("gradient steps", "return of an episode", "oracle")),
        ("learning_curves", ("control steps sampled (millions)", "minutes", "maml, after 1 step")),
        ("tasks", ("distance from 0 of the goal (m)", "before", "after 1 step")),
        ("trajectories", ("x (m)", "y (m)", "goal", "before", "after 1 step")),
    ):
        found = words(tmp_path / "first" / f"{name}.svg")
        assert all(word in found for word in wanted), (name, found)


def test_the_papers_points_stand_beside_ours_where_they_may() -> None:
    """Its MAML of half_cheetah_vel: -129.53, -78.57, -66.62 after 0, 1, 2 steps; not its oracle,
    of which there is none of ours; and none under another protocol or horizon."""
    ours = [-150.0, -90.0, -70.0]
    axes = drawn([outcome(HalfCheetahVel(), ours)], HalfCheetahVel())
    assert heights(axes, "maml") == pytest.approx(ours)
    assert heights(axes, "maml, the paper's") == [-129.53, -78.57, -66.62]
    assert len(labels(axes)) == 2
    for family in (HalfCheetahVel(protocol="gymnasium"), HalfCheetahVel(horizon=100)):
        assert labels(drawn([outcome(family, ours)], family)) == ["maml"]


def test_the_papers_oracle_is_a_line_across_too() -> None:
    """Its 442.69 of half_cheetah_dir, from the first to the last number of steps."""
    family = HalfCheetahDir()
    ours = [outcome(family, [0.0, 400.0, 410.0]), outcome(family, [700.0], method="oracle")]
    (line,) = (one for one in drawn(ours, family).lines if one.get_label() == "oracle, the paper's")
    assert np.asarray(line.get_xdata()).tolist() == [0, 2]
    assert np.asarray(line.get_ydata()) == pytest.approx([442.69, 442.69])


def test_the_papers_pretrained_is_told_to_have_seen_fewer_goals() -> None:
    """In the caption, where its points are drawn, and only there."""
    family = HalfCheetahVel()
    both: tuple[Method, ...] = ("maml", "pretrained")
    for methods, said in ((both[:1], False), (both, True)):
        outcomes = [outcome(family, [-150.0, -90.0], method=m) for m in methods]
        scores = compare(outcomes, family)
        figure = figures.returns_figure(scores, family, outcomes[0].evaluation.tasks)
        assert ("saw 100 fixed ones" in figure.texts[0].get_text()) is said


def test_an_oracle_is_a_line_across() -> None:
    """It takes no step, and is drawn from the first to the last of the others'."""
    family = HalfCheetahDir()
    told = outcome(family, [400.0], method="oracle")
    axes = drawn([outcome(family, [-50.0, 10.0, 20.0, 30.0]), told], family)
    found = points(axes, "oracle")
    assert np.round(found[:, 0]).tolist() == [0, 3]
    assert found[:, 1].tolist() == [400.0, 400.0]


def test_what_falls_off_the_picture_is_named() -> None:
    """A fine-tuned policy at -900 leaves the others readable, and its label says so."""
    family = HalfCheetahVel()
    fallen = outcome(family, [-158.0, -900.0], method="pretrained", size=0.5)
    axes = drawn([outcome(family, [-150.0, -90.0]), fallen], family)
    assert "pretrained (falls to -900)" in labels(axes)
    assert -400 < axes.get_ylim()[0] < -158


def test_step_sizes_have_styles_and_names_of_their_own() -> None:
    """A method's second step size is dashed; colour and marker stay the method's."""
    family = HalfCheetahVel(horizon=100)
    axes = drawn(
        [outcome(family, [-150.0, -90.0], size=size) for size in (0.1, 0.5)]
        + [outcome(family, [-200.0, -190.0], method="random")],
        family,
    )
    first, second, other = axes.get_lines()
    assert labels(axes) == ["maml, step size 0.1", "maml, step size 0.5", "random"]
    assert first.get_linestyle() != second.get_linestyle()
    assert (first.get_color(), first.get_marker()) == (second.get_color(), second.get_marker())
    assert first.get_color() != other.get_color()
    assert first.get_marker() != other.get_marker()


def test_returns_against_the_task_are_those_measured() -> None:
    """Hollow before, filled after: at its speed, each task's return; directions side by side."""
    speeds, directions = HalfCheetahVel(), HalfCheetahDir()
    for family in (speeds, directions):
        outcomes = [outcome(family, [-150.0, -120.0, -90.0])]
        figure = figures.tasks_figure(outcomes, compare(outcomes, family), family)
        assert figure is not None
        before, after = figure.axes[0].get_lines()
        found = outcomes[0].evaluation
        assert np.array_equal(before.get_ydata(), found.returns[0])
        assert np.array_equal(after.get_ydata(), found.returns[2])
        assert after.get_label() == "after 2 steps"
        where = np.asarray(after.get_xdata())
        if family is speeds:
            assert np.allclose(where, found.tasks[:, 0])
        else:
            assert set(np.round(where)) == {0.0, 1.0}
            assert np.array_equal(np.round(where) == 1, found.tasks[:, 0] > 0)
            ticks = [tick.get_text() for tick in figure.axes[0].get_xticklabels()]
            assert ticks == ["backward", "forward"]


def test_tasks_beyond_those_trained_on_are_marked() -> None:
    """With a cross and a word."""
    family = HalfCheetahVel(speed_high=1.0)
    outcomes = [outcome(family, [-150.0, -90.0])]
    figure = figures.tasks_figure(outcomes, compare(outcomes, family), family)
    assert figure is not None
    marked = points(figure.axes[0], "outside training")
    assert (marked[:, 0] > 1).all()
    assert len(marked) == int((outcomes[0].evaluation.tasks > 1).sum())


def panel_lines(figure: Figure) -> Iterator[tuple[Axes, list[np.ndarray]]]:
    for axes in figure.axes:
        yield axes, [np.asarray(line.get_xydata()) for line in axes.get_lines()]


def test_learning_curves_are_the_metrics(runs: list[Subject]) -> None:
    """Against millions of control steps and minutes: each seed, and the mean of both run over up to
    five iterations, before and after; the oracle's batches have no after."""
    figure = figures.curves_figure(runs)
    assert figure is not None
    left, right = figure.axes
    named = [label for label in labels(left) if not label.startswith("_")]
    assert named == ["maml, before", "maml, after 1 step", "oracle"]
    metrics = [read_metrics(run.path / "metrics.csv") for run in runs[:2]]
    mean = np.mean([m["return_1"] for m in metrics], axis=0)
    running = [mean[: i + 1].mean() for i in range(3)]
    assert heights(left, "maml, after 1 step") == pytest.approx(running)
    lines = [np.asarray(line.get_xydata()) for line in left.get_lines()]
    for one in metrics:
        expected = np.column_stack([np.array(one["env_steps"]) / 1e6, one["return_1"]])
        assert any(line.shape == expected.shape and np.allclose(line, expected) for line in lines)
    seconds = [np.cumsum(np.add(m["seconds_sampling"], m["seconds_updating"])) for m in metrics]
    assert np.allclose(points(right, "maml, before")[:, 0], np.mean(seconds, axis=0) / 60)


def test_trajectories_go_from_the_start_to_where_the_reward_says(runs: list[Subject]) -> None:
    """A row a goal, a column a step. Each way begins at 0, has a point more than moves, and the
    rewards are the distances of its points from the goal."""
    family = runs[0].family
    ways = ways_of(runs, outcomes_of(runs, held_out(family, 5), {}), 2)
    figure = figures.trajectories_figure(ways, family)
    assert len(figure.axes) == 2 * 2
    for panel, (axes, lines) in enumerate(panel_lines(figure)):
        row, column = divmod(panel, 2)
        *paths, start, goal = lines
        assert len(paths) == 3  # episodes
        assert np.allclose(start, 0)
        assert np.allclose(goal, ways.tasks[row])
        low, high = axes.get_xlim()
        for episode, path in enumerate(paths):
            rewards = ways.episodes[column].rewards[row, episode].numpy()
            live = ways.episodes[column].alive[row, episode].numpy()
            assert np.array_equal(path[0], (0, 0))
            far = np.linalg.norm(path[1:] - ways.tasks[row], axis=1)
            np.testing.assert_allclose(-far, rewards[live], atol=1e-5)
            assert (path >= low).all()
            assert (path <= high).all()


@pytest.mark.slow
def test_other_families_have_no_trajectories(tmp_path: Path) -> None:
    """And those of before do not stay; a task of three numbers has no picture against it."""
    experiment = load_experiment("half_cheetah_dir", **{**SETTINGS, "iterations": 1})
    meta_train(experiment, out=tmp_path / "run")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "trajectories.png").write_bytes(b"of another test")
    assert run(["evaluate", str(tmp_path / "run"), "--quiet", "--out", str(tmp_path / "out")]) == 0
    drawn = {path.name for path in (tmp_path / "out").glob("*.png")}
    assert drawn == {"returns.png", "learning_curves.png", "tasks.png"}

    class ThreeNumbers(Navigation2D):
        task_columns = (*Navigation2D.task_columns, Navigation2D.task_columns[0])

    none: list[MethodScores] = []
    assert figures.tasks_figure([], none, ThreeNumbers()) is None


def test_a_ruined_policy_does_not_flatten_the_picture_of_tasks() -> None:
    """What lies far below is an arrow at the edge, counted in the legend."""
    family = HalfCheetahVel()
    fallen = outcome(family, [-158.0, -900.0], method="pretrained", size=0.5)
    outcomes = [outcome(family, [-150.0, -90.0]), fallen]
    figure = figures.tasks_figure(outcomes, compare(outcomes, family), family)
    assert figure is not None
    assert -500 < figure.axes[0].get_ylim()[0] < -178
    assert labels(figure.axes[1])[-1] == "40 lower, to -920"


def test_without_matplotlib_what_to_install_is_said(
    runs: list[Subject],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The extra's absence is one sentence, and the numbers are written all the same."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert run(["evaluate", str(runs[0].path), "--out", str(tmp_path / "out")]) == 0
    assert "pip install 'maml-rl[plot]'" in capsys.readouterr().out
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"evaluation.csv", "summary.json"}


def test_several_families_stand_in_a_panel_each() -> None:
    """Three panels and an empty place; in each its own lines and the paper's points."""
    families = [HalfCheetahVel(), HalfCheetahDir(), Navigation2D()]
    figure = figures.panels_figure(
        [(f, [outcome(f, [-10.0 * n, -5.0])]) for n, f in enumerate(families, start=1)]
    )
    assert len(figure.axes) == 4
    assert not figure.axes[3].axison
    for n, (axes, family) in enumerate(zip(figure.axes, families, strict=False), start=1):
        assert axes.get_title() == title(family)
        assert heights(axes, "maml") == pytest.approx([-10.0 * n, -5.0])
        papers = [p.mean for p in paper_returns(family.name)["maml"] if p.steps <= 1]
        assert heights(axes, "maml, the paper's") == papers
    assert "the paper's own points" in figure.texts[-1].get_text()
