"""Pictures of tests and runs, as PNG and SVG; needs the extra `plot`.

returns            return against gradient steps, every method, with the paper's points
learning_curves    return before and after adaptation, against control steps and against hours
tasks              return before and after adaptation against the task: where does it fail?
trajectories       navigation: the ways taken before and after each step

What they share with the charts of a report, such as colours, is in looks.py.
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from envs.family import TaskFamily
from envs.navigation import Navigation2D
from maml_rl.assess import Subject, Ways
from maml_rl.comparison import (
    MAML,
    PRETRAINED,
    Method,
    MethodScores,
    Outcome,
    compare,
    grouped,
    method_name,
    stack,
)
from maml_rl.episodes import Episodes
from maml_rl.errors import RunStopped
from maml_rl.looks import (
    MARKERS,
    SHADES,
    SMOOTHED,
    Floats,
    axis_name,
    colour,
    curve_name,
    curve_style,
    every_value,
    hours,
    looks,
    million_steps,
    phases,
    places,
    readable_range,
    shown,
    thick,
    title,
    values_by_task,
    values_to_show,
    words,
)
from maml_rl.paper import Point, points_for
from maml_rl.runs import read_metrics

LOOK: dict[Any, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "legend.frameon": False,
    # Long enough to show a style beside its marker.
    "legend.handlelength": 3.5,
    "savefig.dpi": 150,
    "savefig.bbox": "tight",
    # The same numbers give the same file, whose words can be searched.
    "svg.fonttype": "none",
    "svg.hashsalt": "maml-rl",
}
"""matplotlib's settings; it types their names one by one, hence Any."""
DRAWN_EPISODES = 10
"""Of each goal in the picture of trajectories."""


def draw(
    folder: Path,
    subjects: Sequence[Subject],
    outcomes: Sequence[Outcome],
    scores: Sequence[MethodScores],
    ways: Ways | None,
) -> list[str]:
    """Draw every figure that there is something for, and return their names.

    Args:
        folder: where to; pictures of a test before are removed.
        subjects: the policies tested, of one family.
        outcomes: their tests.
        scores: what those come to.
        ways: the episodes of some of navigation's tasks.

    Raises:
        RunStopped: if they cannot be written.
    """
    family = subjects[0].family
    with mpl.rc_context(LOOK):
        figures = {
            "returns": returns_figure(scores, family, outcomes[0].evaluation.tasks),
            "learning_curves": curves_figure(subjects),
            "tasks": tasks_figure(outcomes, scores, family),
            "trajectories": None if ways is None else trajectories_figure(ways, family),
        }
        return write_figures(folder, figures)


def write_figures(folder: Path, figures: Mapping[str, Figure | None]) -> list[str]:
    """Write figures as PNG and SVG, and return their names.

    Args:
        folder: where to.
        figures: by name; where there is none, its picture of a test before is removed.

    Raises:
        RunStopped: if they cannot be written.
    """
    drawn = {name: figure for name, figure in figures.items() if figure is not None}
    try:
        for name in figures:
            for kind in ("png", "svg"):
                (folder / f"{name}.{kind}").unlink(missing_ok=True)
        for name, figure in drawn.items():
            figure.savefig(folder / f"{name}.png")
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
    except OSError as error:
        raise RunStopped(
            f"the figures cannot be written to {folder}: {error.strerror}", 3
        ) from error
    return list(drawn)


def png_of(figure: Figure) -> bytes:
    """Return a figure as the content of a PNG file."""
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def returns_figure(
    scores: Sequence[MethodScores], family: TaskFamily, tasks: npt.NDArray[np.float32]
) -> Figure:
    """Return against gradient steps: every method with its interval, and the paper's points."""
    figure = Figure(figsize=(7.5, 5))
    axes = figure.subplots()
    papers = draw_returns(axes, scores, family, tasks)
    axes.set_xlabel("gradient steps")
    axes.set_ylabel("return of an episode")
    axes.set_title(f"{title(family)}: {scores[0].tasks} task{'s' * (scores[0].tasks > 1)}")
    figure.legend(loc="outside right center")
    figure.text(0.01, -0.01, caption(scores, papers), va="top", fontsize=8)
    return figure


def draw_returns(
    axes: Axes,
    scores: Sequence[MethodScores],
    family: TaskFamily,
    tasks: npt.NDArray[np.float32],
) -> Mapping[str, Sequence[Point]]:
    """Draw returns against gradient steps, and return the paper's points that are among them."""
    papers = points_for(family, tasks)
    last = max(step.steps for one in scores for step in one.steps)
    papers = {
        method: [point for point in points if point.steps <= last]
        for method, points in papers.items()
        if method in {one.method for one in scores}
    }
    low, high = readable_range(values_to_show(scores, papers), every_value(scores))
    for number, (one, look) in enumerate(zip(scores, looks(scores), strict=True)):
        shade = SHADES[look.colour].figure
        means = np.array([step.mean for step in one.steps])
        bounds = np.array([step.interval for step in one.steps])
        label = shown(one, scores)
        if means.min() < low:
            label += f" (falls to {means.min():.0f})"
        steps = np.arange(len(means))
        if len(means) == 1:
            # No gradient step, so the same all along.
            steps, means, bounds = np.array([0, last]), means.repeat(2), bounds.repeat(2, 0)
        # Beside one another, so that the intervals can be told apart.
        aside = 0.02 * (number - (len(scores) - 1) / 2) * min(last, 3)
        axes.plot(steps + aside, means, look.style, marker=look.marker, color=shade, label=label)
        axes.vlines(steps + aside, *bounds.T, color=shade, linewidth=2.5, alpha=0.5)
    for method, points in papers.items():
        # One that takes no gradient step is the same all along, as ours.
        ends = [(0, points[0].mean), (last, points[0].mean)]
        places = [(p.steps, p.mean) for p in points] if len(points) > 1 else ends
        axes.plot(
            *zip(*places, strict=True),
            ":",
            marker=MARKERS[method],
            markerfacecolor="white",
            markersize=8,
            color=SHADES[method].figure,
            label=f"{method}, the paper's",
        )
    axes.set_ylim(low, high)
    axes.set_xticks(range(last + 1))
    return papers


def caption(scores: Sequence[MethodScores], papers: Mapping[str, object]) -> str:
    """Return what the picture of returns must be read with."""
    runs = sorted({len(one.seeds) for one in scores})
    text = "Mean over tasks"
    if runs != [1]:
        text += f" and {' or '.join(map(str, runs))} runs"
    text += ", bars: its 95 % bootstrap interval over tasks."
    if papers:
        text += "\nDotted, hollow: the paper's own points (Finn et al. 2017) on the same tasks."
    if PRETRAINED in papers:
        text += (
            "\nWhere there are more than two tasks, its pretrained policies saw 100 fixed ones in "
            "training, ours new ones in every batch."
        )
    return text


def curves_figure(subjects: Sequence[Subject]) -> Figure | None:
    """Learning curves against control steps and time: seeds thin, their running mean thick."""
    curves: dict[tuple[Method, str], list[Mapping[str, Sequence[float]]]] = {}
    for subject in subjects:
        file = subject.path / "metrics.csv"
        metrics = read_metrics(file) if file.is_file() else {}
        if metrics:
            curves.setdefault((subject.method, subject.variant), []).append(metrics)
    if not curves:
        return None
    longest = max(float(hours(run)[-1]) for runs in curves.values() for run in runs)
    unit, factor = ("hours", 1.0) if longest > 1.5 else ("minutes", 60.0)
    figure = Figure(figsize=(10, 4.5))
    left, right = figure.subplots(1, 2, sharey=True)
    for method, variant in curves:
        runs = curves[method, variant]
        variants = [v for m, v in curves if m == method]
        shade = SHADES[colour(method, variants.index(variant))].figure
        look: dict[str, Any] = {"color": shade}
        name = method_name(method, variant)
        count = phases(runs[0])
        for phase in range(count):
            label, style = curve_name(name, phase, count), curve_style(method, phase, count)
            for axes, x in ((left, million_steps), (right, lambda run: hours(run) * factor)):
                lines = [(x(run), np.array(run[f"return_{phase}"])) for run in runs]
                for line in lines:
                    axes.plot(*line, linewidth=0.4, alpha=0.5, **look)
                axes.plot(*thick(lines), linewidth=2.0, linestyle=style, label=label, **look)
    left.set_xlabel("control steps sampled (millions)")
    right.set_xlabel(f"time sampling and updating ({unit})")
    left.set_ylabel("return of an episode")
    left.set_title(f"{title(subjects[0].family)}: training batches", loc="left")
    handles, labels = right.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center")
    text = f"Thin: each seed. Thick: mean over seeds, running over {SMOOTHED} iterations."
    figure.text(0.01, -0.01, text, va="top", fontsize=8)
    return figure


def tasks_figure(
    outcomes: Sequence[Outcome], scores: Sequence[MethodScores], family: TaskFamily
) -> Figure | None:
    """Return before and after adaptation against the task, a panel a method.

    A task of two numbers is drawn at its distance from 0. None where it has more. Runs of several
    seeds are averaged.
    """
    if len(family.task_columns) > 2:
        return None
    groups = grouped(outcomes)
    per_task = [stack(groups[one.key]).mean(1) for one in scores]
    tasks = outcomes[0].evaluation.tasks
    columns = min(len(scores), 3)
    rows = math.ceil(len(scores) / columns)
    figure = Figure(figsize=(3.6 * columns + 0.6, 3.2 * rows + 0.4))
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    finite = family.finite_tasks
    where = places(family, tasks)
    lasts = [float(r) for returns in per_task for r in returns[-1]]
    low, high = readable_range(values_by_task(scores, per_task), lasts)
    for axes, one, returns in itertools.zip_longest(grid.flat, scores, per_task):
        if one is None:
            axes.set_visible(False)
            continue
        panel(axes, one, where, returns, groups[one.key][0].outside_training, low)
        axes.set_title(shown(one, scores), fontsize=10)
        axes.legend(fontsize=8, handlelength=1.5)
        if finite is not None:
            axes.set_xticks(range(len(finite)), [family.describe_task(t) for t in finite])
    grid[0, 0].set_ylim(low, high)
    name, unit = axis_name(family)
    figure.supxlabel(f"{name} ({unit})" if unit else name, fontsize=10)
    figure.supylabel("return of an episode", fontsize=10)
    figure.suptitle(title(family), fontsize=11)
    return figure


def panels_figure(
    benchmarks: Sequence[tuple[TaskFamily, Sequence[Outcome]]],
) -> Figure:
    """Return against gradient steps, a panel for each family: the paper's figure 5."""
    columns = min(2, len(benchmarks))
    rows = math.ceil(len(benchmarks) / columns)
    figure = Figure(figsize=(6.5 * columns, 4.5 * rows))
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in grid[len(benchmarks) :]:
        axes.set_axis_off()
    drawn: dict[str, Sequence[Point]] = {}
    everything: list[MethodScores] = []
    for axes, (family, outcomes) in zip(grid, benchmarks, strict=False):
        scores = compare(outcomes, family)
        everything += scores
        drawn |= draw_returns(axes, scores, family, outcomes[0].evaluation.tasks)
        axes.set_title(title(family))
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=7, handlelength=5)
    figure.supxlabel("gradient steps", fontsize=10)
    figure.supylabel("return of an episode", fontsize=10)
    figure.text(0.01, -0.01, caption(everything, drawn), va="top", fontsize=8)
    return figure


def panel(
    axes: Axes,
    one: MethodScores,
    where: Floats,
    returns: Floats,
    outside: npt.NDArray[np.bool_],
    low: float,
) -> None:
    """Draw one method's returns (n + 1, T) before and after at the tasks' places (T,)."""
    first, last = returns[0], returns[-1]
    axes.vlines(where, first, last, color="#BBBBBB", linewidth=0.8)
    plain: dict[str, Any] = {"linestyle": "", "color": SHADES[one.method].figure, "markersize": 5}
    marker = MARKERS[one.method]
    axes.plot(where, first, marker, markerfacecolor="white", label="before", **plain)
    if len(returns) > 1:
        axes.plot(where, last, marker, label=f"after {words(len(returns) - 1)}", **plain)
    fallen = last < low
    if fallen.any():
        label = f"{int(fallen.sum())} lower, to {last.min():.0f}"
        bottom = np.full(int(fallen.sum()), low)
        axes.plot(where[fallen], bottom, "v", color="black", clip_on=False, label=label)
    if outside.any():
        axes.plot(where[outside], last[outside], "x", color="black", label="outside training")


def trajectories_figure(ways: Ways, family: TaskFamily) -> Figure:
    """Navigation's ways before and after each step, a row a goal."""
    assert isinstance(family, Navigation2D), "only its tasks are points of a plane"
    paths = [
        [
            [way(step, row, e, family.max_move) for e in range(step.rewards.shape[1])]
            for step in ways.episodes
        ]
        for row in range(len(ways.tasks))
    ]
    # The same for all, and square.
    everything = [point for goal in paths for step in goal for path in step for point in path]
    reach = 1.05 * max(float(np.abs(ways.tasks).max()), float(np.abs(everything).max()))
    steps = len(ways.episodes)
    figure = Figure(figsize=(2.7 * steps + 0.6, 2.7 * len(ways.tasks) + 0.6))
    grid = figure.subplots(len(ways.tasks), steps, sharex=True, sharey=True, squeeze=False)
    for row, column in itertools.product(range(len(ways.tasks)), range(steps)):
        axes = grid[row, column]
        for path in paths[row][column][:DRAWN_EPISODES]:
            axes.plot(*path.T, color=SHADES[MAML].figure, linewidth=0.8, alpha=0.7)
        axes.plot(0, 0, "o", color="black", markersize=5, label="start")
        star: dict[str, Any] = {
            "color": SHADES[PRETRAINED].figure,
            "markersize": 13,
            "markeredgecolor": "black",
        }
        axes.plot(*ways.tasks[row], "*", label="goal", **star)
        axes.set(aspect="equal", xlim=(-reach, reach), ylim=(-reach, reach))
        if row == 0:
            axes.set_title("before" if column == 0 else f"after {words(column)}")
    grid[0, 0].legend(fontsize=8, loc="best", handlelength=1.5)
    figure.supxlabel("x (m)", fontsize=10)
    figure.supylabel("y (m)", fontsize=10)
    one = ways.outcome
    many = min(DRAWN_EPISODES, one.evaluation.episodes)
    figure.suptitle(
        f"{title(family)}: {one.method}, seed {one.seed}, step size {one.step_size:g}, "
        f"{many} episodes for each goal",
        fontsize=11,
    )
    return figure


def way(episodes: Episodes, task: int, episode: int, max_move: float) -> Floats:
    """Return the positions (t + 1, 2) of one episode of navigation, the last one too."""
    alive = episodes.alive[task, episode]
    before = episodes.observations[task, episode][alive][:, :2].cpu().double().numpy()
    if not len(before):
        return np.zeros((1, 2))
    moves = episodes.actions[task, episode][alive].cpu().double().numpy()
    last = before[-1] + max_move * np.clip(moves[-1], -1.0, 1.0)
    return np.concatenate([before, last[None]])
