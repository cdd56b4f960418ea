"""What figures and the page's charts share: looks of methods, what to show, how axes are called.

Colours are Okabe and Ito's, which the colour-blind tell apart; markers and line styles do the same
without colour. Their one-letter names are matplotlib's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from envs.family import TaskFamily
from maml_rl.comparison import MAML, ORACLE, PRETRAINED, RANDOM, MethodScores
from maml_rl.paper import Point

Floats = npt.NDArray[np.float64]
Metrics = Mapping[str, Sequence[float]]
"""Columns of a metrics.csv."""


class Shades(NamedTuple):
    """One colour, for figures and for a page in either scheme."""

    figure: str
    light: str
    """On white, with 3:1 of contrast at the least."""
    dark: str
    """On near black, likewise."""


SHADES: Mapping[str, Shades] = {
    MAML: Shades("#0072B2", "#0072B2", "#4AA8E0"),
    PRETRAINED: Shades("#D55E00", "#C85500", "#F08A3C"),
    ORACLE: Shades("#009E73", "#008661", "#2DC39A"),
    RANDOM: Shades("#666666", "#666666", "#A6A6A6"),
    "other-1": Shades("#CC79A7", "#B8578C", "#E29BC2"),
    "other-2": Shades("#56B4E9", "#2A93CC", "#8FD0F5"),
    "other-3": Shades("#E69F00", "#AD7700", "#E6B33C"),
}
"""By method; the others are of a method's second, third, ... variant."""
OTHERS = tuple(name for name in SHADES if name.startswith("other"))
MARKERS: Mapping[str, str] = {MAML: "o", PRETRAINED: "s", ORACLE: "D", RANDOM: "^"}
STYLES = ("-", "--", "-.", ":")
"""Of a method's first, second, ... step size or variant."""
CURVES: Mapping[str, str] = {MAML: "-", PRETRAINED: "--", ORACLE: "-.", RANDOM: "-"}
"""Of a method's learning curve; before adaptation it is dotted."""
SMOOTHED = 5
"""Iterations that a thick learning curve is a running mean of."""


class Look(NamedTuple):
    """How a method is drawn."""

    colour: str
    """A name in SHADES."""
    marker: str
    style: str


def shown(one: MethodScores, scores: Sequence[MethodScores]) -> str:
    """Return a method's name in a legend, with its step size where one has several."""
    several = sum(other.name == one.name for other in scores) > 1
    return f"{one.name}, step size {one.step_size:g}" if several else one.name


def colour(method: str, number: int) -> str:
    """Return the name of the colour of a method's variant, of which the first is number 0."""
    return OTHERS[(number - 1) % len(OTHERS)] if number else method


def looks(scores: Sequence[MethodScores]) -> list[Look]:
    """Return colour, marker and line style of each."""
    result = []
    for place, one in enumerate(scores):
        before = scores[:place]
        variants = list(dict.fromkeys(o.variant for o in before if o.method == one.method))
        number = variants.index(one.variant) if one.variant in variants else len(variants)
        style = STYLES[sum(other.method == one.method for other in before) % len(STYLES)]
        result.append(Look(colour(one.method, number), MARKERS[one.method], style))
    return result


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


def values_by_task(scores: Sequence[MethodScores], per_task: Sequence[Floats]) -> list[float]:
    """Return what no picture of returns against the task may leave out, as `values_to_show`.

    Args:
        scores: the methods.
        per_task: their returns, each (n + 1, T).
    """
    alone = len({one.method for one in scores}) == 1
    values: list[float] = []
    for one, returns in zip(scores, per_task, strict=True):
        whole = alone or one.method in (MAML, ORACLE)
        values += (returns if whole else returns[:1]).ravel().tolist()
    return values


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


def title(family: TaskFamily) -> str:
    """Return a family's name, with its protocol if it has one."""
    protocol = family.protocol_name
    return f"{family.name} ({protocol} protocol)" if protocol else family.name


def words(steps: int) -> str:
    """Return "1 step", "2 steps" and so on."""
    return f"{steps} step{'s' * (steps > 1)}"


def axis_name(family: TaskFamily) -> tuple[str, str]:
    """Return what a picture's axis of tasks means, and its unit, "" for finitely many tasks."""
    column = family.task_columns[0]
    if family.finite_tasks is not None:
        return column.name, ""
    what = column.meaning or column.name
    what = f"distance from 0 of the {what}" if len(family.task_columns) > 1 else what
    return what, column.unit


def places(family: TaskFamily, tasks: npt.NDArray[np.float32]) -> Floats:
    """Return where tasks are on that axis, (T,).

    A task of two numbers is at its distance from 0, and the repetitions of one of finitely many
    are spread about its number.
    """
    finite = family.finite_tasks
    if finite is not None:
        return spread_out(tasks, finite)
    numbers = tasks.astype(np.float64)
    return numbers[:, 0] if numbers.shape[1] == 1 else np.linalg.norm(numbers, axis=1)


def spread_out(tasks: npt.NDArray[np.float32], finite: npt.NDArray[np.float32]) -> Floats:
    """Return a place (T,) on the axis for each repetition of finitely many tasks."""
    spots = np.zeros(len(tasks))
    for number, task in enumerate(finite):
        mask = (tasks == task).all(axis=1)
        spots[mask] = number + np.linspace(-0.3, 0.3, int(mask.sum()))
    return spots


def phases(metrics: Metrics) -> int:
    """Return how many batches an iteration samples: before any gradient step, after one, ..."""
    return sum(1 for name in metrics if name.startswith("return_") and not name.endswith("_sd"))


def curve_name(name: str, phase: int, count: int) -> str:
    """Return what a learning curve is called: the method, and before or after how many steps."""
    if count == 1:
        return name
    return f"{name}, before" if phase == 0 else f"{name}, after {words(phase)}"


def curve_style(method: str, phase: int, count: int) -> str:
    """Return a learning curve's line style."""
    return ":" if phase < count - 1 else CURVES[method]


def thick(lines: Sequence[tuple[Floats, Floats]], over: int = SMOOTHED) -> tuple[Floats, Floats]:
    """Return the mean of several seeds' curves, and of each point and the `over` - 1 before it."""
    count = min(len(across) for across, _ in lines)
    across, up = (np.mean([line[axis][:count] for line in lines], axis=0) for axis in (0, 1))
    windows = [up[max(0, i + 1 - over) : i + 1] for i in range(count)]
    # What is not known, as before a change of settings brought it, is left out.
    known = [window[~np.isnan(window)] for window in windows]
    return across, np.array([window.mean() if len(window) else np.nan for window in known])


def million_steps(metrics: Metrics) -> Floats:
    """Return control steps sampled at the end of each iteration, millions."""
    return np.array(metrics["env_steps"]) / 1e6


def hours(metrics: Metrics) -> Floats:
    """Return the time sampled and updated for by the end of each iteration, hours."""
    seconds = np.array(metrics["seconds_sampling"]) + np.array(metrics["seconds_updating"])
    result: Floats = seconds.cumsum() / 3600
    return result
