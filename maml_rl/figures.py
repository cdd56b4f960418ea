"""Pictures of tests and runs, as PNG and SVG; needs the extra `plot`.

returns            return against gradient steps, every method, with the paper's points
learning_curves    return before and after adaptation, against control steps and against hours
tasks              return before and after adaptation against the task: where does it fail?
trajectories       navigation: the ways taken before and after each step

Colours are Okabe and Ito's, which the colour-blind tell apart; markers and line styles do the same
without colour.
"""

from __future__ import annotations

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
    ORACLE,
    PRETRAINED,
    RANDOM,
    Method,
    MethodScores,
    Outcome,
    grouped,
    stack,
)
from maml_rl.episodes import Episodes
from maml_rl.errors import RunStopped
from maml_rl.paper import Point, points_for
from maml_rl.runs import read_metrics

Floats = npt.NDArray[np.float64]

COLOURS: Mapping[str, str] = {
    MAML: "#0072B2",
    PRETRAINED: "#D55E00",
    ORACLE: "#009E73",
    RANDOM: "#666666",
}
OTHERS = ("#56B4E9", "#CC79A7", "#E69F00")
"""Of a method's second, third, ... variant."""
MARKERS: Mapping[str, str] = {MAML: "o", PRETRAINED: "s", ORACLE: "D", RANDOM: "^"}
STYLES = ("-", "--", "-.", ":")
"""Of a method's first, second, ... step size."""
CURVES: Mapping[str, str] = {MAML: "-", PRETRAINED: "--", ORACLE: "-.", RANDOM: "-"}
"""Of a method's learning curve; before adaptation it is dotted."""
SMOOTHED = 5
"""Iterations that a thick learning curve is a running mean of."""

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
NAMES = ("returns", "learning_curves", "tasks", "trajectories")


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
        drawn = {name: figure for name, figure in figures.items() if figure is not None}
        try:
            for name in NAMES:
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


def shown(one: MethodScores, scores: Sequence[MethodScores]) -> str:
    """Return a method's name in a legend, with its step size where one has several."""
    several = sum(other.name == one.name for other in scores) > 1
    return f"{one.name}, step size {one.step_size:g}" if several else one.name


def colour(method: str, number: int) -> str:
    """Return the colour of a method's variant, of which the first is number 0."""
    return OTHERS[(number - 1) % len(OTHERS)] if number else COLOURS[method]


def looks(scores: Sequence[MethodScores]) -> list[tuple[str, str, str]]:
    """Return colour, marker and line style of each."""
    result = []
    for place, one in enumerate(scores):
        before = scores[:place]
        variants = list(dict.fromkeys(o.variant for o in before if o.method == one.method))
        number = variants.index(one.variant) if one.variant in variants else len(variants)
        style = STYLES[sum(other.name == one.name for other in before) % len(STYLES)]
        result.append((colour(one.method, number), MARKERS[one.method], style))
    return result


def returns_figure(
    scores: Sequence[MethodScores], family: TaskFamily, tasks: npt.NDArray[np.float32]
) -> Figure:
    """Return against gradient steps: every method with its interval, and the paper's points."""
    figure = Figure(figsize=(7.5, 5))
    axes = figure.subplots()
    papers = points_for(family, tasks)
    last = max(step.steps for one in scores for step in one.steps)
    papers = {
        method: [point for point in points if point.steps <= last]
        for method, points in papers.items()
        if method in {one.method for one in scores}
    }
    low, high = readable_range(values_to_show(scores, papers), every_value(scores))
    for number, (one, (shade, marker, style)) in enumerate(zip(scores, looks(scores), strict=True)):
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
        axes.plot(steps + aside, means, style, marker=marker, color=shade, label=label)
        axes.vlines(steps + aside, *bounds.T, color=shade, linewidth=2.5, alpha=0.5)
    for method, points in papers.items():
        axes.plot(
            [point.steps for point in points],
            [point.mean for point in points],
            ":",
            marker=MARKERS[method],
            markerfacecolor="white",
            markersize=8,
            color=COLOURS[method],
            label=f"{method}, the paper's",
        )
    axes.set_ylim(low, high)
    axes.set_xticks(range(last + 1))
    axes.set_xlabel("gradient steps")
    axes.set_ylabel("return of an episode")
    axes.set_title(f"{title(family)}: {scores[0].tasks} task{'s' * (scores[0].tasks > 1)}")
    figure.legend(loc="outside right center")
    figure.text(0.01, -0.01, caption(scores, papers), va="top", fontsize=8)
    return figure


def values_to_show(
    scores: Sequence[MethodScores], papers: Mapping[str, Sequence[Point]]
) -> list[float]:
    """Return what no picture of returns may leave out: every start, all of MAML and the paper's.

    With the bounds of their intervals. All of every policy, where there is one method alone.
    """
    values = [point.mean for points in papers.values() for point in points]
    alone = len({one.method for one in scores}) == 1
    for one in scores:
        for step in one.steps if alone or one.method in (MAML, ORACLE) else one.steps[:1]:
            values += [x for x in (step.mean, *step.interval) if not math.isnan(x)]
    return values


def every_value(scores: Sequence[MethodScores]) -> list[float]:
    """Return the mean returns of every method and step."""
    return [step.mean for one in scores for step in one.steps]


def readable_range(needed: Sequence[float], others: Sequence[float]) -> tuple[float, float]:
    """Return a range that holds what is needed, and of the others those not far below it.

    A policy that fine-tuning ruins may fall a hundred times lower, and would leave of all else a
    line.
    """
    span = max(max(needed) - min(needed), 1e-3)
    low = min([*needed, *(x for x in others if x > min(needed) - span)])
    high = max([*needed, *others])
    margin = 0.06 * max(high - low, 1e-3)
    return low - margin, high + margin


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
            "\nIts pretrained policies saw 100 fixed goals in training, ours new ones in every "
            "batch: they saw fewer goals than ours."
        )
    return text


def title(family: TaskFamily) -> str:
    """Return a family's name, with its protocol if it has one."""
    protocol = family.protocol_name
    return f"{family.name} ({protocol} protocol)" if protocol else family.name


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
        look: dict[str, Any] = {"color": colour(method, variants.index(variant))}
        name = f"{method} ({variant})" if variant else method
        phases = sum(1 for n in runs[0] if n.startswith("return_") and not n.endswith("_sd"))
        for phase in range(phases):
            label = name
            if phases > 1:
                label += ", before" if phase == 0 else f", after {words(phase)}"
            style = ":" if phase < phases - 1 else CURVES[method]
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


def thick(lines: Sequence[tuple[Floats, Floats]]) -> tuple[Floats, Floats]:
    """Return the mean of several seeds' curves, and of each point and those before it."""
    count = min(len(across) for across, _ in lines)
    across, up = (np.mean([line[axis][:count] for line in lines], axis=0) for axis in (0, 1))
    smooth = [np.nanmean(up[max(0, i + 1 - SMOOTHED) : i + 1]) for i in range(count)]
    return across, np.array(smooth)


def words(steps: int) -> str:
    """Return "1 step", "2 steps" and so on."""
    return f"{steps} step{'s' * (steps > 1)}"


def million_steps(metrics: Mapping[str, Sequence[float]]) -> Floats:
    """Return control steps sampled at the end of each iteration, millions."""
    return np.array(metrics["env_steps"]) / 1e6


def hours(metrics: Mapping[str, Sequence[float]]) -> Floats:
    """Return the time sampled and updated for by the end of each iteration, hours."""
    seconds = np.array(metrics["seconds_sampling"]) + np.array(metrics["seconds_updating"])
    result: Floats = seconds.cumsum() / 3600
    return result


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
    where = places(tasks) if finite is None else spread_out(tasks, finite)
    needed: list[float] = []
    for one, returns in zip(scores, per_task, strict=True):
        whole = one.method in (MAML, ORACLE) or len({s.method for s in scores}) == 1
        needed += (returns if whole else returns[:1]).ravel().tolist()
    low, high = readable_range(needed, [float(r) for returns in per_task for r in returns[-1]])
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
    figure.supxlabel(axis_name(family), fontsize=10)
    figure.supylabel("return of an episode", fontsize=10)
    figure.suptitle(title(family), fontsize=11)
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
    plain: dict[str, Any] = {"linestyle": "", "color": COLOURS[one.method], "markersize": 5}
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


def axis_name(family: TaskFamily) -> str:
    """Return what a picture's axis of tasks means, with its unit."""
    column = family.task_columns[0]
    if family.finite_tasks is not None:
        return column.name
    what = column.meaning or column.name
    what = f"distance from 0 of the {what}" if len(family.task_columns) > 1 else what
    return f"{what} ({column.unit})"


def places(tasks: npt.NDArray[np.float32]) -> Floats:
    """Return where a task of one or two numbers is on the axis, (T,)."""
    numbers = tasks.astype(np.float64)
    return numbers[:, 0] if numbers.shape[1] == 1 else np.linalg.norm(numbers, axis=1)


def spread_out(tasks: npt.NDArray[np.float32], finite: npt.NDArray[np.float32]) -> Floats:
    """Return a place (T,) on the axis for each repetition of finitely many tasks."""
    spots = np.zeros(len(tasks))
    for number, task in enumerate(finite):
        mask = (tasks == task).all(axis=1)
        spots[mask] = number + np.linspace(-0.3, 0.3, int(mask.sum()))
    return spots


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
            axes.plot(*path.T, color=COLOURS[MAML], linewidth=0.8, alpha=0.7)
        axes.plot(0, 0, "o", color="black", markersize=5, label="start")
        star: dict[str, Any] = {
            "color": COLOURS[PRETRAINED],
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
