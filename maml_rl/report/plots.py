"""The charts of a report: what tests found and how training went, as `charts` draws them."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from envs.family import TaskFamily
from maml_rl.assess import Subject
from maml_rl.comparison import Method, MethodScores, Outcome, grouped, method_name, stack
from maml_rl.errors import refusal
from maml_rl.looks import (
    MARKERS,
    SMOOTHED,
    Floats,
    Look,
    Metrics,
    axis_name,
    colour,
    curve_name,
    curve_style,
    every_value,
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
from maml_rl.paper import Point as PaperPoint
from maml_rl.report.charts import Axis, Chart, Line, Point, Series
from maml_rl.runs import read_metrics
from maml_rl.terminal import step_words

RETURN = "return of an episode"
MOST_POINTS = 250
"""Of a learning curve; a longer one is thinned."""
BESIDE = 5.0
"""Between the intervals of two methods after as many steps, in the units of the picture."""


def returns_chart(
    scores: Sequence[MethodScores],
    papers: Mapping[str, Sequence[PaperPoint]],
    family: TaskFamily,
) -> Chart:
    """Return against gradient steps: every method with its interval, and the paper's points.

    Args:
        scores: the methods.
        papers: the paper's points of the same tasks, by method.
        family: what was tested on.
    """
    last = max(step.steps for one in scores for step in one.steps)
    alone = [y for one in scores for step in one.steps for y in step.by_seed]
    low, high = readable_range(values_to_show(scores, papers), every_value(scores) + alone)
    series = []
    for number, (one, look) in enumerate(zip(scores, looks(scores), strict=True)):
        name = shown(one, scores)
        least = min(step.mean for step in one.steps)
        name += f" (falls to {least:.0f})" if least < low else ""
        aside = BESIDE * (number - (len(scores) - 1) / 2)
        points = [
            Point(step.steps, step.mean, *step.interval, step_words(step.steps))
            for step in one.steps
        ]
        points = across(points, last)
        series.append(series_of(name, points, look, aside))
    series += [
        Series(
            name=f"{method}, the paper's",
            points=across(
                [Point(p.steps, p.mean, label=step_words(p.steps)) for p in points], last
            ),
            colour=method,
            marker=MARKERS[method],
            style=":",
            hollow=True,
        )
        for method, points in papers.items()
    ]
    ends = [f"{shown(one, scores)} {path_words(one)}" for one in scores]
    return Chart(
        name="returns",
        title=f"Return against gradient steps, {title(family)}",
        summary=f"Mean return over {scores[0].tasks} tasks: {'; '.join(ends)}.",
        x=Axis(
            name="gradient steps",
            low=-0.3,
            high=last + 0.3,
            ticks=[(step, str(step)) for step in steps_to_name(last)],
        ),
        y=Axis(name=RETURN, low=low, high=high),
        series=series,
        behind=[
            line
            for one, look in zip(scores, looks(scores), strict=True)
            for line in seed_lines(one, look)
        ],
    )


def seed_lines(one: MethodScores, look: Look) -> list[Line]:
    """Return the mean return of each of several runs of a method, against gradient steps."""
    if len(one.seeds) == 1:
        return []
    runs = zip(*(step.by_seed for step in one.steps), strict=True)
    return [Line([(float(x), y) for x, y in enumerate(run)], look.colour) for run in runs]


def across(points: list[Point], last: int) -> list[Point]:
    """Return the points of a policy; the same all along, where it takes no gradient step."""
    if len(points) > 1 or last == 0:
        return points
    (only,) = points
    return [replace(only, x=x, label="takes no gradient step") for x in (0, last)]


def series_of(name: str, points: Sequence[Point], look: Look, aside: float = 0.0) -> Series:
    """Return a method's series."""
    return Series(
        name=name,
        points=points,
        colour=look.colour,
        marker=look.marker,
        style=look.style,
        aside=aside,
    )


def path_words(one: MethodScores) -> str:
    """Return a method's return before and after its last gradient step in words."""
    first, last = one.steps[0], one.steps[-1]
    if first is last:
        return f"{first.mean:.1f} without a gradient step"
    return f"from {first.mean:.1f} to {last.mean:.1f} after {words(last.steps)}"


def steps_to_name(last: int) -> list[int]:
    """Return the numbers of gradient steps that an axis names: at most about ten."""
    return list(range(0, last + 1, math.ceil(max(last, 1) / 10)))


def task_charts(
    outcomes: Sequence[Outcome], scores: Sequence[MethodScores], family: TaskFamily
) -> list[Chart]:
    """Return before and after adaptation against the task, a chart a method, all on one scale.

    Runs of several seeds are averaged. None where a task has more than two numbers.
    """
    if len(family.task_columns) > 2:
        return []
    groups = grouped(outcomes)
    per_task = [stack(groups[one.key]).mean(1) for one in scores]
    lasts = [float(r) for returns in per_task for r in returns[-1]]
    low, high = readable_range(values_by_task(scores, per_task), lasts)
    x = task_axis(family, [groups[one.key][0].evaluation.tasks for one in scores])
    charts = []
    for number, (one, returns) in enumerate(zip(scores, per_task, strict=True)):
        run = groups[one.key][0]
        tasks = run.evaluation.tasks
        where = places(family, tasks)
        labels = [f"task {i}: {family.describe_task(task)}" for i, task in enumerate(tasks)]
        name, unit = axis_name(family)
        after = f"after {words(len(returns) - 1)}" if len(returns) > 1 else ""
        summary = (
            f"{shown(one, scores)}: return of each of {len(tasks)} tasks against "
            f"{name}{f' in {unit}' if unit else ''}, before adapting {range_words(returns[0])}"
            + (f", {after} {range_words(returns[-1])}." if after else ".")
        )
        stems = [
            Line([(x, a), (x, b)], "stem")
            for x, a, b in zip(where, returns[0], returns[-1], strict=True)
        ]
        charts.append(
            Chart(
                name=f"tasks-{number}",
                title=shown(one, scores),
                summary=summary,
                x=x,
                y=Axis(name=RETURN, low=low, high=high),
                series=task_series(one, where, returns, labels, run.outside_training),
                behind=stems if after else (),
            )
        )
    return charts


def range_words(values: Floats) -> str:
    """Return the least and the most of some values in words."""
    return f"{values.min():.1f} to {values.max():.1f}"


def task_axis(family: TaskFamily, tasks: Sequence[npt.NDArray[np.float32]]) -> Axis:
    """Return the axis that tasks of a family lie on."""
    name, unit = axis_name(family)
    finite = family.finite_tasks
    if finite is not None:
        ticks = [(float(i), family.describe_task(task)) for i, task in enumerate(finite)]
        return Axis(name=name, low=-0.5, high=len(finite) - 0.5, ticks=ticks)
    where = np.concatenate([places(family, some) for some in tasks])
    margin = 0.04 * max(float(np.ptp(where)), 1e-3)
    low, high = float(where.min()) - margin, float(where.max()) + margin
    return Axis(name=name, unit=unit, low=low, high=high, digits=2)


def task_series(
    one: MethodScores,
    where: Floats,
    returns: Floats,
    labels: Sequence[str],
    outside: npt.NDArray[np.bool_],
) -> list[Series]:
    """Return one method's returns (n + 1, T) before and after at the tasks' places (T,)."""

    def at(name: str, values: Floats, chosen: npt.NDArray[np.bool_]) -> Series:
        # From left to right, as the arrow keys walk.
        points = [
            Point(float(where[i]), float(values[i]), label=labels[i])
            for i in map(int, np.argsort(where, kind="stable"))
            if chosen[i]
        ]
        return Series(name=name, points=points, colour=one.method, marker=MARKERS[one.method])

    first = "before" if len(returns) > 1 else "takes no gradient step"
    result = [replace(at(first, returns[0], np.ones(len(where), bool)), hollow=True)]
    if len(returns) > 1:
        after = f"after {words(len(returns) - 1)}"
        result.append(at(after, returns[-1], ~outside))
        if outside.any():
            beyond = at(f"{after}, outside training", returns[-1], outside)
            result.append(replace(beyond, marker="x"))
    return result


def curves_chart(subjects: Sequence[Subject]) -> tuple[Chart | None, str]:
    """Learning curves against control steps, and what was done to them, in words.

    None where no run has any.
    """
    runs: dict[tuple[Method, str], list[Metrics]] = {}
    for subject in subjects:
        if metrics := metrics_of(subject.path, subject.iterations):
            runs.setdefault((subject.method, subject.variant), []).append(metrics)
    series: list[Series] = []
    behind: list[Line] = []
    every = 1
    for (method, variant), found in runs.items():
        variants = [v for m, v in runs if m == method]
        shade = colour(method, variants.index(variant))
        name = method_name(method, variant)
        for phase in range(count := phases(found[0])):
            lines = [(million_steps(run), np.array(run[f"return_{phase}"])) for run in found]
            stride = math.ceil(max(len(x) for x, _ in lines) / MOST_POINTS)
            every = max(every, stride)
            behind += [Line(thinned(*line, stride), shade) for line in lines]
            points = [Point(*at) for at in thinned(*thick(lines, max(SMOOTHED, stride)), stride)]
            label = curve_name(name, phase, count)
            style = curve_style(method, phase, count)
            series.append(Series(name=label, points=points, colour=shade, style=style))
    if not series:
        return None, ""
    return curves_of(series, behind, subjects[0].family), curves_note(every)


def metrics_of(run: Path, iterations: int) -> Metrics:
    """Return a run's metrics up to the checkpoint that is tested; none where it has none.

    Args:
        run: its folder.
        iterations: of the checkpoint.

    Raises:
        InputError: if they are damaged.
    """
    file = run / "metrics.csv"
    try:
        metrics = read_metrics(file) if file.is_file() else {}
    except (ValueError, TypeError, csv.Error) as error:
        hint = "remove it for a page without its learning curves"
        raise refusal(f"{file} is damaged: {error}; {hint}") from error
    rows = [i for i, number in enumerate(metrics.get("iteration", ())) if number < iterations]
    return {name: [column[i] for i in rows] for name, column in metrics.items()} if rows else {}


def thinned(across: Floats, up: Floats, stride: int) -> list[tuple[float, float]]:
    """Return every `stride`th point of a curve, counted from its last."""
    places = range((len(across) - 1) % stride, len(across), stride)
    return [(float(across[i]), float(up[i])) for i in places]


def curves_of(series: Sequence[Series], behind: Sequence[Line], family: TaskFamily) -> Chart:
    """Return the chart of learning curves."""
    drawn = [at for line in behind for at in line.points] + [
        (p.x, p.y) for one in series for p in one.points
    ]
    heights = [y for _, y in drawn if math.isfinite(y)] or [0.0]
    low, high = readable_range(heights, heights)
    ends = [f"{one.name} ends at {one.points[-1].y:.1f}" for one in series]
    return Chart(
        name="curves",
        title=f"Learning curves, {title(family)}",
        summary=f"Return of the training batches against control steps: {'; '.join(ends)}.",
        x=Axis(
            name="control steps sampled",
            unit="millions",
            low=0.0,
            high=1.02 * max(x for x, _ in drawn),
            digits=2,
        ),
        y=Axis(name=RETURN, low=low, high=high),
        series=series,
        behind=behind,
    )


def curves_note(every: int) -> str:
    """Return how the learning curves were smoothed."""
    note = (
        "Thin: each run's training batches. Thick, and what is read off: the mean over runs, "
        f"running over {max(SMOOTHED, every)} iterations."
    )
    return note + (f" Of long curves one iteration in {every} is drawn." if every > 1 else "")
