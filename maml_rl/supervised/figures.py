"""Pictures of supervised tests, as PNG and SVG; needs the extra `plot`.

steps              score against gradient steps, every network, with the paper's points
fits               sine curves: what is fitted to a few points, before and after gradient steps
learning_curves    scores of training batches and of validation tasks against iterations
examples           images of test tasks, and what they are taken for before and after
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from maml_rl.figures import LOOK, png_of, write_figures
from maml_rl.looks import SHADES, words
from maml_rl.supervised.close_ups import Fit, Pictured, Row, fits_of, pictured, states_of
from maml_rl.supervised.evaluate import ORACLE, PRETRAINED, Outcome, kind_of
from maml_rl.supervised.looks import (
    Drawn,
    Panel,
    Range,
    across,
    axis_name,
    curves_of,
    curves_range,
    labels_of,
    last_step,
    looks_of,
    names_of,
    panels_of,
    paper_look,
    range_of,
    shots_words,
    subjects_of,
)
from maml_rl.supervised.tasks import Problem

MOST_CLASSES, MOST_IMAGES = 10, 3
"""Of a task's images that are drawn, and of each class."""
FIGURE_COLOURS = frozenset(shades.figure for shades in SHADES.values())
RIGHT, WRONG = SHADES[ORACLE].figure, SHADES[PRETRAINED].figure


def draw(folder: Path, outcomes: Sequence[Outcome]) -> list[str]:
    """Draw every figure that there is something for, and return their names.

    Args:
        folder: where to; pictures of a test before are removed.
        outcomes: every test.

    Raises:
        RunStopped: if they cannot be written.
    """
    with mpl.rc_context(LOOK):
        return write_figures(
            folder,
            {
                "steps": steps_figure(outcomes),
                "fits": fits_figure(fits_of(outcomes)),
                "learning_curves": curves_figure(outcomes),
                "examples": examples_figure(outcomes[0], pictured(outcomes[0])),
            },
        )


def examples_png(one: Outcome, tasks: Sequence[Pictured]) -> bytes:
    """Return the picture of some tasks' images as the content of a PNG file."""
    with mpl.rc_context(LOOK):
        figure = examples_figure(one, tasks)
        assert figure is not None, "there are tasks"
        return png_of(figure)


def steps_figure(outcomes: Sequence[Outcome]) -> Figure:
    """Score against gradient steps: a panel a number of shots, a line a test."""
    problem = outcomes[0].subject.experiment.data
    panels = panels_of(outcomes)
    last, within = last_step(panels), range_of(panels, problem)
    labels = labels_of(panels, within)
    figure = Figure(figsize=(4.6 * len(panels) + 2.6, 4.4))
    row = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, panel in zip(row, panels, strict=True):
        for number, test in enumerate(panel.tests):
            # Beside one another, so that the intervals can be told apart.
            aside = 0.025 * (number - (len(panel.tests) - 1) / 2) * min(last, 4)
            steps_line(axes, test, labels[test.name], last, aside, within)
        papers(axes, panel)
        axes.set_xticks(range(0, last + 1, max(1, round(last / 10))))
        axes.set_xlabel("gradient steps")
        axes.set_title(shots_words(problem, panel.shots), fontsize=10)
    scale(row[0], within, problem)
    figure.suptitle(f"{kind_of(problem)}: {tasks_words(outcomes)}", fontsize=11)
    legend(figure, row)
    text = "Mean over tasks, bars: its 95 % interval."
    if any(panel.papers for panel in panels):
        text += " Dotted, hollow: the paper's own scores (Finn et al. 2017)."
    figure.text(0.01, -0.01, text, va="top", fontsize=8)
    return figure


def tasks_words(outcomes: Sequence[Outcome]) -> str:
    """Return how many tasks a test is of, in words."""
    count = outcomes[0].scores.shape[1]
    return f"{count} test task{'s' * (count > 1)}"


def steps_line(axes: Axes, test: Drawn, label: str, last: int, aside: float, within: Range) -> None:
    """Draw a test's scores with their intervals; where they leave the picture, arrows."""
    steps, means, half = across(test, last)
    shade, look = SHADES[test.look.colour].figure, test.look
    inside = np.isfinite(means) & (means <= within.high)
    # As far as a line can lead without numbers that no picture takes.
    held = np.where(np.isfinite(means), np.minimum(means, 10 * within.high), np.nan)
    axes.plot(steps + aside, held, look.style, color=shade, label=label, marker=look.marker)
    low, high = ((means + sign * half)[inside] for sign in (-1, 1))
    low = np.maximum(low, within.low)
    axes.vlines(steps[inside] + aside, low, high, color=shade, linewidth=2.5, alpha=0.5)
    if not inside.all():
        top = np.full(int((~inside).sum()), within.high)
        axes.plot(steps[~inside] + aside, top, "^", color=shade, clip_on=False)


def papers(axes: Axes, panel: Panel) -> None:
    """Draw the paper's scores, hollow, with their intervals where it has them."""
    for method, scores in panel.papers:
        look = paper_look(method, panel)
        shade = SHADES[look.colour].figure
        steps, means = [score.steps for score in scores], [score.mean for score in scores]
        half = np.nan_to_num([score.half_width for score in scores])
        axes.plot(
            steps,
            means,
            ":",
            marker=look.marker,
            markerfacecolor="white",
            markersize=8,
            color=shade,
            label=f"{method}, the paper's",
        )
        axes.vlines(steps, means - half, means + half, color=shade, linewidth=1.2)


def scale(axes: Axes, within: Range, problem: Problem) -> None:
    """Set the range of an axis of scores, and name it."""
    if within.log:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(within.low, within.high)
    name, unit = axis_name(problem)
    axes.set_ylabel(f"{name} ({unit})" if unit else name)


def legend(figure: Figure, panels: Sequence[Axes], *, below: bool = False) -> None:
    """Name the lines of several panels, each once, beside them.

    Or below them, where a line has the colour of its panel, and no colour in the legend.
    """
    found: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    if not below:
        figure.legend(list(found.values()), list(found), loc="outside right center")
        return
    handles = [copy.copy(handle) for handle in found.values()]
    for handle in handles:
        if handle.get_color() in FIGURE_COLOURS:
            handle.set_color("black")
    columns = len(found) if figure.get_figwidth() > 2.0 * len(found) else 2
    figure.legend(handles, list(found), loc="outside lower center", ncols=columns)


def fits_figure(rows: Sequence[Row]) -> Figure | None:
    """What networks fit to the points of a curve: a row a network, a column a choice of points."""
    if not rows:
        return None
    looks = looks_of([row.outcome.subject for row in rows])
    columns = len(rows[0].fits)
    figure = Figure(figsize=(2.9 * columns + 0.6, 2.3 * len(rows) + 1.1))
    grid = figure.subplots(len(rows), columns, sharex=True, sharey=True, squeeze=False)
    reach = 1.5 * max(float(np.abs(fit.true).max()) for row in rows for fit in row.fits)
    for line, row, look in zip(grid, rows, looks, strict=True):
        for axes, one in zip(line, row.fits, strict=True):
            fit_panel(axes, one, SHADES[look.colour].figure)
            axes.set_ylim(-reach, reach)
        line[0].set_ylabel(f"{row.name}\ny")
    for axes, one in zip(grid[0], rows[0].fits, strict=True):
        many = f"{one.shots} point{'s' * (one.shots > 1)}"
        axes.set_title(f"{many}, upper half of x" if one.half else many, fontsize=10)
    for axes in grid[-1]:
        axes.set_xlabel("x")
    legend(figure, list(grid[:, 0]), below=True)
    sizes = ", ".join(
        f"{row.name} {row.outcome.step_size:g}" for row in rows if len(row.outcome.scores) > 1
    )
    figure.suptitle(f"One test curve{f' (step size: {sizes})' if sizes else ''}", fontsize=11)
    return figure


def fit_panel(axes: Axes, one: Fit, shade: str) -> None:
    """Draw a curve, its points, and a network before and after gradient steps."""
    axes.plot(one.grid, one.true, color="#999999", linewidth=3, alpha=0.6, label="the curve")
    for name, style, y in states_of(one):
        width = 2.0 if style == "-" else 1.4
        reach = 10 * float(np.abs(one.true).max())
        held = np.clip(np.nan_to_num(y, nan=np.inf), -reach, reach)
        axes.plot(one.grid, held, style, color=shade, linewidth=width, label=name)
    axes.plot(one.x, one.y, "^", color="black", markersize=6, label="points", zorder=3)


def curves_figure(outcomes: Sequence[Outcome]) -> Figure | None:
    """Learning curves against iterations, a panel a run."""
    subjects = subjects_of(outcomes)
    problem = subjects[0].experiment.data
    found = [
        (name, look, curves)
        for subject, name, look in zip(
            subjects, names_of(subjects), looks_of(subjects), strict=True
        )
        if (curves := curves_of(subject))
    ]
    if not found:
        return None
    columns = min(len(found), 3)
    rows = -(-len(found) // columns)
    figure = Figure(figsize=(4.2 * columns + (3.0 if columns == 1 else 0.6), 3.4 * rows + 0.8))
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    within = curves_range([curves for *_, curves in found], problem)
    for axes in grid.flat[len(found) :]:
        axes.set_visible(False)
    for axes, (name, look, curves) in zip(grid.flat, found, strict=False):
        for one in curves:
            shade = "#888888" if one.batches else SHADES[look.colour].figure
            width = 0.8 if one.batches else 1.8
            axes.plot(
                one.iterations,
                np.minimum(one.scores, 10 * within.high),
                one.style,
                # A run of one row is a point.
                marker="." if len(one.iterations) == 1 else "",
                color=shade,
                linewidth=width,
                label=one.name,
            )
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("iterations")
    for line in grid:
        scale(line[0], within, problem)
    figure.suptitle(f"{kind_of(problem)}: learning curves", fontsize=11)
    legend(figure, list(grid.flat[: len(found)]), below=True)
    return figure


def examples_figure(one: Outcome, tasks: Sequence[Pictured]) -> Figure | None:
    """Test tasks' images: what is adapted to, and what others are taken for before and after."""
    if not tasks:
        return None
    columns = min(len(tasks[0].support), MOST_CLASSES)
    shown = min(tasks[0].support.shape[1], MOST_IMAGES)
    judged = min(tasks[0].query.shape[1], MOST_IMAGES)
    states = list(tasks[0].guesses)
    lines = shown + judged * len(states)
    figure = Figure(figsize=(0.95 * columns + 2.2, (1.05 * lines + 0.9) * len(tasks) + 0.5))
    parts = figure.subfigures(len(tasks), 1, squeeze=False)[:, 0]
    for number, (part, task) in enumerate(zip(parts, tasks, strict=True)):
        grid = part.subplots(lines, columns, squeeze=False)
        for axes in grid.flat:
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set(visible=True, color="#DDDDDD")
        for column in range(columns):
            for line in range(shown):
                picture(grid[line, column], task.support[column, line])
            grid[0, column].set_title(f"class {column + 1}", fontsize=9)
        side(grid[0, 0], "to adapt to")
        for place, step in enumerate(states):
            top = shown + place * judged
            when = f"after {words(step)}" if step else "before"
            side(grid[top, 0], f"{when}:\n{task.right(step):.0%} right")
            for column in range(columns):
                for line in range(judged):
                    axes = grid[top + line, column]
                    picture(axes, task.query[column, line])
                    verdict(axes, int(task.guesses[step][column, line]), column)
        part.suptitle(f"Test task {number + 1}", fontsize=10)
    problem = one.subject.experiment.data
    (name,) = names_of([one.subject])
    figure.suptitle(f"{kind_of(problem)}: {name}", fontsize=11)
    text = "Below an image: the class that it is taken for, and whether that is right."
    figure.text(0.01, -0.005, text, va="top", fontsize=8)
    return figure


def picture(axes: Axes, pixels: Any) -> None:
    """Draw an image (H, W, C); of one channel in grey."""
    grey = pixels.shape[-1] == 1
    axes.imshow(pixels[..., 0] if grey else pixels, cmap="gray", vmin=0.0, vmax=1.0)


def side(axes: Axes, text: str) -> None:
    """Say beside a line of images what they are."""
    axes.set_ylabel(text, rotation=0, ha="right", va="center", fontsize=9, labelpad=8)


def verdict(axes: Axes, guess: int, truth: int) -> None:
    """Frame an image, and say below which class it is taken for and whether that is right."""
    right = guess == truth
    axes.spines[:].set(color=RIGHT if right else WRONG, linewidth=2.5)
    axes.set_xlabel(f"{guess + 1} {'✓' if right else '✗'}", fontsize=9, labelpad=2)
    axes.xaxis.label.set_color(RIGHT if right else WRONG)
