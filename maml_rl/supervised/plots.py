"""The charts of a page of supervised runs, as `maml_rl.report.charts` draws them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from maml_rl.looks import Floats
from maml_rl.report.charts import Axis, Chart, Point, Series
from maml_rl.report.plots import BESIDE, MOST_POINTS, steps_to_name, thinned
from maml_rl.supervised.close_ups import Row, states_of
from maml_rl.supervised.evaluate import Outcome
from maml_rl.supervised.looks import (
    Curve,
    Drawn,
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
    test_words,
)
from maml_rl.supervised.tasks import Problem
from maml_rl.terminal import step_words

DIGITS = {True: 1, False: 3}
"""Decimals of a score that is read from a chart, by whether it is an accuracy in percent."""


def score_axis(problem: Problem, within: Range) -> Axis:
    """Return the axis that scores lie on."""
    name, unit = axis_name(problem)
    return Axis(
        name=name,
        unit=unit,
        low=within.low,
        high=within.high,
        log=within.log,
        digits=DIGITS[problem.classifies],
    )


def steps_charts(outcomes: Sequence[Outcome]) -> list[Chart]:
    """Score against gradient steps: a chart a number of shots, all on one scale."""
    problem = outcomes[0].subject.experiment.data
    panels = panels_of(outcomes)
    last, within = last_step(panels), range_of(panels, problem)
    labels = labels_of(panels, within)
    charts = []
    for number, panel in enumerate(panels):
        middle = (len(panel.tests) - 1) / 2
        series = [
            steps_series(test, labels[test.name], last, BESIDE * (place - middle))
            for place, test in enumerate(panel.tests)
        ]
        for method, scores in panel.papers:
            look = paper_look(method, panel)
            points = [
                Point(
                    score.steps,
                    score.mean,
                    score.mean - score.half_width,
                    score.mean + score.half_width,
                    step_words(score.steps),
                )
                for score in scores
            ]
            series.append(
                Series(
                    name=f"{method}, the paper's",
                    points=points,
                    colour=look.colour,
                    marker=look.marker,
                    style=look.style,
                    hollow=True,
                )
            )
        words = shots_words(problem, panel.shots)
        charts.append(
            Chart(
                name=f"steps-{number}",
                title=words,
                summary=f"Mean {axis_name(problem)[0]} with {words}: {test_words(panel)}.",
                x=Axis(
                    name="gradient steps",
                    low=-0.3,
                    high=last + 0.3,
                    ticks=[(step, str(step)) for step in steps_to_name(last)],
                ),
                y=score_axis(problem, within),
                series=series,
            )
        )
    return charts


def steps_series(test: Drawn, name: str, last: int, aside: float) -> Series:
    """Return a test's scores with their intervals."""
    alone = len(test.means) == 1 and last > 0
    points = []
    for step, mean, half in zip(*(values.tolist() for values in across(test, last)), strict=True):
        known = half if math.isfinite(half) else math.nan
        label = "takes no gradient step" if alone else step_words(int(step))
        points.append(Point(step, mean, mean - known, mean + known, label))
    return Series(
        name=name,
        points=points,
        colour=test.look.colour,
        marker=test.look.marker,
        style=test.look.style,
        aside=aside,
    )


def curves_charts(outcomes: Sequence[Outcome]) -> list[Chart]:
    """Learning curves against iterations, a chart a run, all on one scale."""
    subjects = subjects_of(outcomes)
    problem = subjects[0].experiment.data
    looks = looks_of(subjects)
    found = [
        (name, look.colour, curves)
        for subject, name, look in zip(subjects, names_of(subjects), looks, strict=True)
        if (curves := curves_of(subject))
    ]
    if not found:
        return []
    within = curves_range([curves for *_, curves in found], problem)
    last = max(float(one.iterations[-1]) for *_, curves in found for one in curves)
    charts = []
    for number, (name, shade, curves) in enumerate(found):
        ends = [f"{one.name} end at {one.scores[-1]:.3g}" for one in curves]
        charts.append(
            Chart(
                name=f"curves-{number}",
                title=name,
                summary=f"{axis_name(problem)[0]} against iterations: {'; '.join(ends)}.",
                x=Axis(name="iterations", low=0.0, high=1.02 * last, digits=0),
                y=score_axis(problem, within),
                series=[curve_series(one, shade) for one in curves],
            )
        )
    return charts


def curve_series(one: Curve, shade: str) -> Series:
    """Return a learning curve, thinned where it is long; one of a single row is a point."""
    stride = math.ceil(len(one.iterations) / MOST_POINTS)
    return Series(
        name=one.name,
        points=[Point(*at) for at in thinned(one.iterations, one.scores, stride)],
        colour="random" if one.batches else shade,
        style=one.style,
        marker="o" if len(one.iterations) == 1 else "",
    )


def fits_charts(rows: Sequence[Row]) -> list[Chart]:
    """What networks fit to the points of a curve, a chart a network and choice of points."""
    if not rows:
        return []
    reach = 1.5 * max(float(np.abs(fit.true).max()) for row in rows for fit in row.fits)
    looks = looks_of([row.outcome.subject for row in rows])
    charts: list[Chart] = []
    for row, look in zip(rows, looks, strict=True):
        for fit in row.fits:
            many = f"{fit.shots} point{'s' * (fit.shots > 1)}"
            where = f"{many}{' in the upper half of x' if fit.half else ''}"
            states = states_of(fit)
            errors = [
                f"{state.name} {float(np.mean((state.values - fit.true) ** 2)):.3g}"
                for state in states
            ]
            charts.append(
                Chart(
                    name=f"fit-{len(charts)}",
                    title=f"{row.name}, {where}",
                    summary=f"{row.name} and {where} of a sine curve: mean squared distance from "
                    f"the curve {', '.join(errors)}.",
                    x=Axis(name="x", low=float(fit.grid[0]), high=float(fit.grid[-1]), digits=2),
                    y=Axis(name="y", low=-reach, high=reach, digits=2),
                    series=[
                        Series(
                            name="the curve",
                            points=points_of(fit.grid, fit.true),
                            colour="random",
                            style="-",
                        ),
                        *(
                            Series(
                                name=state.name,
                                points=points_of(fit.grid, state.values),
                                colour=look.colour,
                                style=state.style,
                            )
                            for state in states
                        ),
                        Series(
                            name="points to adapt to",
                            points=points_of(fit.x, fit.y),
                            colour="other-3",
                            marker="^",
                        ),
                    ],
                )
            )
    return charts


def points_of(x: Floats, y: Floats) -> list[Point]:
    """Return points from left to right, as the arrow keys walk."""
    return [Point(float(x[i]), float(y[i])) for i in map(int, np.argsort(x, kind="stable"))]
