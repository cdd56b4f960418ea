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
from matplotlib.figure import Figure

from envs.family import TaskFamily
from envs.navigation import Navigation2D
from maml_rl.assess import MAML, PRETRAINED, RANDOM, Subject, evaluate_policy
from maml_rl.comparison import ORACLE, MethodScores, Outcome
from maml_rl.episodes import Episodes
from maml_rl.errors import RunStopped
from maml_rl.paper import points_for
from maml_rl.runs import read_metrics
from maml_rl.task_sets import TaskSet

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
DRAWN_TASKS, DRAWN_EPISODES = 3, 10
"""Goals and episodes of each in the picture of trajectories."""


def draw(
    folder: Path,
    subjects: Sequence[Subject],
    outcomes: Sequence[Outcome],
    scores: Sequence[MethodScores],
) -> list[str]:
    """Draw every figure that there is something for, and return their names.

    Args:
        folder: where to; pictures of a test before are replaced.
        subjects: the policies tested, of one family, with the settings of the test.
        outcomes: their tests.
        scores: what those come to.

    Raises:
        RunStopped: if they cannot be written.
    """
    family = subjects[0].family
    with mpl.rc_context(LOOK):
        figures = {
            "returns": returns_figure(scores, family, outcomes[0].evaluation.tasks),
            "learning_curves": curves_figure(subjects),
            "tasks": tasks_figure(outcomes, scores, family),
            "trajectories": trajectories_figure(subjects, outcomes),
        }
        drawn = {name: figure for name, figure in figures.items() if figure is not None}
        try:
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
    low, high = readable_range(scores, papers)
    for one, (colour, marker, style) in zip(scores, looks(scores), strict=True):
        means = np.array([step.mean for step in one.steps])
        bounds = np.array([step.interval for step in one.steps])
        label = shown(one, scores)
        if means.min() < low:
            label += f" (falls to {means.min():.0f})"
        steps = np.arange(len(means))
        if len(means) == 1:
            # No gradient step, so the same all along.
            steps, means, bounds = np.array([0, last]), means.repeat(2), bounds.repeat(2, 0)
        axes.plot(steps, means, style, marker=marker, color=colour, label=label)
        axes.fill_between(steps, *bounds.T, color=colour, alpha=0.15, linewidth=0)
    for method, points in papers.items():
        if method not in {one.method for one in scores}:
            continue
        points = [point for point in points if point.steps <= last]
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
    axes.set_title(f"{title(family)}: {scores[0].tasks} tasks")
    figure.legend(loc="outside right center")
    figure.text(0.01, -0.01, caption(scores, papers), va="top", fontsize=8)
    return figure


def readable_range(
    scores: Sequence[MethodScores], papers: Mapping[str, Sequence[tuple[int, float, float]]]
) -> tuple[float, float]:
    """Return the range of returns to show: every start, all of MAML and of the paper's.

    A policy that fine-tuning ruins may fall a hundred times lower, and would leave of all else a
    line.
    """
    last = max(step.steps for one in scores for step in one.steps)
    values = [point[1] for points in papers.values() for point in points if point[0] <= last]
    for one in scores:
        whole = one.method in (MAML, ORACLE) or len({s.method for s in scores}) == 1
        values += [step.mean for step in (one.steps if whole else one.steps[:1])]
    ends = [step.mean for one in scores for step in one.steps]
    span = max(max(values) - min(values), 1e-3)
    # What falls a little lower still fits in.
    low = min([*values, *(e for e in ends if e > min(values) - span)])
    high = max(values + ends)
    margin = 0.08 * max(high - low, 1e-3)
    return low - margin, high + margin


def caption(scores: Sequence[MethodScores], papers: Mapping[str, object]) -> str:
    """Return what the picture of returns must be read with."""
    runs = sorted({len(one.seeds) for one in scores})
    text = "Mean over tasks"
    if runs != [1]:
        text += f" and {' or '.join(map(str, runs))} runs"
    text += ", with its 95 % bootstrap interval over tasks."
    methods = {one.method for one in scores}
    if methods & papers.keys():
        text += "\nDotted, hollow: the paper's own points (Finn et al. 2017), without interval."
    if PRETRAINED in methods & papers.keys():
        text += (
            " Its pretrained policies saw 100 fixed goals\nin training, ours new ones in every "
            "batch: they saw fewer goals than ours."
        )
    return text


def title(family: TaskFamily) -> str:
    """Return a family's name, with its protocol if it has one."""
    protocol = getattr(family, "protocol", "")
    return f"{family.name} ({protocol} protocol)" if protocol else family.name


def curves_figure(subjects: Sequence[Subject]) -> Figure | None:
    """Learning curves against control steps and hours: seeds thin, their mean thick."""
    curves: dict[tuple[str, str], list[Mapping[str, Sequence[float]]]] = {}
    for subject in subjects:
        file = subject.path / "metrics.csv"
        metrics = read_metrics(file) if file.is_file() else {}
        if metrics:
            curves.setdefault((subject.method, subject.variant), []).append(metrics)
    if not curves:
        return None
    longest = max(float(hours(run)[-1]) for runs in curves.values() for run in runs)
    unit, factor = ("hours", 1.0) if longest > 1.5 else ("minutes", 60.0)

    def times(run: Mapping[str, Sequence[float]]) -> Floats:
        return hours(run) * factor

    figure = Figure(figsize=(10, 4.5))
    left, right = figure.subplots(1, 2, sharey=True)
    for number, ((method, variant), runs) in enumerate(curves.items()):
        variants = [v for m, v in curves if m == method]
        shade = colour(method, variants.index(variant))
        name = f"{method} ({variant})" if variant else method
        # Ten markers a line, and not all methods' at one place.
        apart = max(1, len(runs[0]["iteration"]) // 10)
        every = (number * apart // 4 % apart, apart)
        phases = sum(1 for n in runs[0] if n.startswith("return_") and not n.endswith("_sd"))
        for phase in range(phases):
            label = name
            if phases > 1:
                label += ", before" if phase == 0 else f", after {words(phase)}"
            style = STYLES[(phases - 1 - phase) % len(STYLES)]
            for axes, x in ((left, million_steps), (right, times)):
                lines = [(x(run), np.array(run[f"return_{phase}"])) for run in runs]
                look = {"color": shade, "linestyle": style}
                marks = {"marker": MARKERS[method], "markersize": 4, "markevery": every}
                if len(lines) > 1:
                    for line in lines:
                        axes.plot(*line, linewidth=0.5, alpha=0.6, **look)
                count = min(len(across) for across, _ in lines)
                mean = [
                    np.mean([part[:count] for part in parts], 0)
                    for parts in zip(*lines, strict=True)
                ]
                axes.plot(*mean, linewidth=1.6, label=label, **look, **marks)
    left.set_xlabel("control steps sampled (millions)")
    right.set_xlabel(f"time sampling and updating ({unit})")
    left.set_ylabel("return of an episode")
    left.set_title(f"{title(subjects[0].family)}: training batches", loc="left")
    handles, labels = right.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center")
    return figure


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

    None where a task is more than two numbers. Runs of several seeds are averaged.
    """
    width = len(family.task_columns)
    if width > 2:
        return None
    per_task = [
        np.mean([o.evaluation.returns for o in outcomes if belongs(o, one)], axis=0)
        for one in scores
    ]
    tasks = outcomes[0].evaluation.tasks
    if width == 2:
        return plane_figure(scores, per_task, tasks, family)
    columns = min(len(scores), 3)
    rows = math.ceil(len(scores) / columns)
    figure = Figure(figsize=(3.6 * columns + 0.6, 3.2 * rows + 0.4))
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    finite = family.finite_tasks
    where = tasks[:, 0].astype(np.float64) if finite is None else spread_out(tasks, finite)
    for axes, one, returns in itertools.zip_longest(grid.flat, scores, per_task):
        if one is None:
            axes.set_visible(False)
            continue
        axes.vlines(where, returns[0], returns[-1], color="#BBBBBB", linewidth=0.8)
        plain = {"linestyle": "", "color": COLOURS[one.method], "markersize": 5}
        marker = MARKERS[one.method]
        axes.plot(where, returns[0], marker, markerfacecolor="white", label="before", **plain)
        if len(returns) > 1:
            label = f"after {words(len(returns) - 1)}"
            axes.plot(where, returns[-1], marker, label=label, **plain)
        outside = family.outside_training(tasks)
        if outside.any():
            ends = returns[-1][outside]
            axes.plot(where[outside], ends, "x", color="black", label="outside training")
        axes.set_title(shown(one, scores), fontsize=10)
        axes.legend(fontsize=8)
        if finite is not None:
            axes.set_xticks(range(len(finite)), [family.describe_task(t) for t in finite])
    column = family.task_columns[0]
    what = column.meaning or column.name
    figure.supxlabel(f"{what} ({column.unit})" if finite is None else column.name, fontsize=10)
    figure.supylabel("return of an episode", fontsize=10)
    figure.suptitle(title(family), fontsize=11)
    return figure


def belongs(outcome: Outcome, one: MethodScores) -> bool:
    """Whether a test is one of those that a method's scores come from."""
    key = (outcome.method, outcome.variant, outcome.step_size, outcome.source)
    return key == (one.method, one.variant, one.step_size, one.source)


def spread_out(tasks: npt.NDArray[np.float32], finite: npt.NDArray[np.float32]) -> Floats:
    """Return a place (T,) on the axis for each repetition of finitely many tasks."""
    places = np.zeros(len(tasks))
    for number, task in enumerate(finite):
        mask = (tasks == task).all(axis=1)
        places[mask] = number + np.linspace(-0.3, 0.3, int(mask.sum()))
    return places


def plane_figure(
    scores: Sequence[MethodScores],
    per_task: Sequence[Floats],
    tasks: npt.NDArray[np.float32],
    family: TaskFamily,
) -> Figure:
    """Return before and after adaptation as the brightness of each task in its plane."""
    figure = Figure(figsize=(2.6 * len(scores) + 1.2, 5.6))
    grid = figure.subplots(2, len(scores), sharex=True, sharey=True, squeeze=False)
    low, high = readable_range(scores, {})
    low = min(low, min(float(returns[0].min()) for returns in per_task))
    points = None
    for column, (one, returns) in enumerate(zip(scores, per_task, strict=True)):
        for row, step in enumerate((0, len(returns) - 1)):
            axes = grid[row, column]
            if row and not step:
                axes.set_visible(False)
                continue
            points = axes.scatter(
                *tasks.T,
                c=returns[step],
                cmap="cividis",
                vmin=low,
                vmax=high,
                s=45,
                edgecolors="black",
                linewidths=0.5,
                marker=MARKERS[one.method],
            )
            axes.set_aspect("equal")
            axes.set_title(
                f"after {words(step)}" if row else f"{shown(one, scores)}\nbefore", fontsize=9
            )
    assert points is not None
    bar = figure.colorbar(points, ax=grid, shrink=0.8, extend="min")
    bar.set_label("return of an episode")
    names = [f"{c.name} ({c.unit})" for c in family.task_columns]
    figure.supxlabel(names[0], fontsize=10)
    figure.supylabel(names[1], fontsize=10)
    return figure


def trajectories_figure(subjects: Sequence[Subject], outcomes: Sequence[Outcome]) -> Figure | None:
    """Navigation's ways before and after each step: a row a goal, the tested ones' first.

    Of the first meta-trained policy, or else the first; None for other families.
    """
    subject = next((s for s in subjects if s.method == MAML), subjects[0])
    if not isinstance(subject.family, Navigation2D):
        return None
    outcome = next(o for o in outcomes if (o.method, o.seed) == (subject.method, subject.seed))
    found = outcome.evaluation
    goals = found.tasks[:DRAWN_TASKS]
    seen: list[Episodes] = []
    evaluate_policy(
        subject.trained,
        tasks=TaskSet(outcome.source, goals),
        step_size=outcome.step_size,
        see=seen.append,
    )
    # The same for all, and square.
    reach = 1.05 * max(
        float(np.abs(goals).max()), *(float(e.observations[e.alive].abs().max()) for e in seen)
    )
    figure = Figure(figsize=(2.7 * len(seen) + 0.6, 2.7 * len(goals) + 0.6))
    grid = figure.subplots(len(goals), len(seen), sharex=True, sharey=True, squeeze=False)
    for column, episodes in enumerate(seen):
        for row, goal in enumerate(goals):
            axes = grid[row, column]
            for episode in range(min(DRAWN_EPISODES, found.episodes)):
                alive = episodes.alive[row, episode]
                way = episodes.observations[row, episode][alive].cpu().numpy()
                axes.plot(*way.T[:2], color=COLOURS[MAML], linewidth=0.8, alpha=0.7)
            axes.plot(0, 0, "o", color="black", markersize=5, label="start")
            axes.plot(
                *goal,
                "*",
                color=COLOURS[PRETRAINED],
                markersize=13,
                markeredgecolor="black",
                label="goal",
            )
            axes.set(aspect="equal", xlim=(-reach, reach), ylim=(-reach, reach))
            if row == 0:
                axes.set_title("before" if column == 0 else f"after {words(column)}")
    grid[0, 0].legend(fontsize=8, loc="best")
    figure.supxlabel("x (m)", fontsize=10)
    figure.supylabel("y (m)", fontsize=10)
    many = min(DRAWN_EPISODES, found.episodes)
    figure.suptitle(
        f"{subject.method}, seed {subject.seed}: {many} episodes for each goal", fontsize=11
    )
    return figure


__all__ = ["draw"]
