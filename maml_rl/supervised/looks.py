"""What figures and the page's charts of supervised tests share: names, looks, what is shown.

Numbers are as they are read: accuracy in percent, and the mean squared error as it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from maml_rl.looks import MARKERS, OTHERS, SHADES, STYLES, Floats, Look, readable_range
from maml_rl.report.plots import metrics_of
from maml_rl.supervised.evaluate import Outcome, Subject
from maml_rl.supervised.paper import PaperScore
from maml_rl.supervised.results import papers_of, shown
from maml_rl.supervised.tasks import Problem
from maml_rl.supervised.trained import measure_name
from maml_rl.terminal import step_words

WIDE_SPREAD = 30.0
"""Ratio of the largest to the least error from which on an axis is logarithmic."""
OTHER_MARKERS = ("^", "v", "s", "D", "o")
"""Of methods and runs beside the first of those that have a colour of their own."""
SHORT_STATISTICS = {"batch": "query's statistics", "support": "support's statistics"}
"""What batch normalisation goes by, in a legend."""


def unit_of(problem: Problem) -> float:
    """Return what a score is multiplied by to be read: 100 for an accuracy in percent."""
    return 100.0 if problem.classifies else 1.0


def axis_name(problem: Problem) -> tuple[str, str]:
    """Return what scores are called, and their unit."""
    return ("accuracy", "%") if problem.classifies else ("mean squared error", "")


def subjects_of(outcomes: Sequence[Outcome]) -> list[Subject]:
    """Return the networks that tests are of, each once."""
    return list({id(one.subject): one.subject for one in outcomes}.values())


def names_of(subjects: Sequence[Subject]) -> list[str]:
    """Return what each network is called: its method, or its run where two are alike."""
    methods = [subject.method for subject in subjects]
    return [
        subject.path.resolve().name if methods.count(method) > 1 else method
        for subject, method in zip(subjects, methods, strict=True)
    ]


def looks_of(subjects: Sequence[Subject]) -> list[Look]:
    """Return colour and marker of each network; the first of a known method has that one's."""
    result: list[Look] = []
    for subject in subjects:
        others = sum(look.colour in OTHERS for look in result)
        if subject.method in MARKERS and subject.method not in [look.colour for look in result]:
            look = Look(subject.method, MARKERS[subject.method], STYLES[0])
        else:
            marker = OTHER_MARKERS[others % len(OTHER_MARKERS)]
            look = Look(OTHERS[others % len(OTHERS)], marker, STYLES[0])
        result.append(look)
    return result


class Drawn(NamedTuple):
    """A test as it is drawn."""

    outcome: Outcome
    name: str
    look: Look
    means: Floats
    """(n + 1,): mean scores as they are read."""
    half_widths: Floats
    """(n + 1,): of their 95 % intervals."""


class Panel(NamedTuple):
    """Tests with as many shots."""

    shots: int
    tests: list[Drawn]
    papers: list[tuple[str, list[PaperScore]]]
    """The paper's scores by method, as they are read."""


def panels_of(outcomes: Sequence[Outcome]) -> list[Panel]:
    """Return the tests to be drawn, those of a number of shots together."""
    subjects = subjects_of(outcomes)
    named = {
        id(subject): (name, look)
        for subject, name, look in zip(
            subjects, names_of(subjects), looks_of(subjects), strict=True
        )
    }
    result = []
    for shots in dict.fromkeys(one.shots for one in outcomes):
        some = [one for one in outcomes if one.shots == shots]
        tests: list[Drawn] = []
        for one in some:
            name, look = named[id(one.subject)]
            mine = [other for other in some if other.subject is one.subject]
            if len({other.step_size for other in mine}) > 1:
                name += f", step size {one.step_size:g}"
            if len({other.statistics for other in some}) > 1:
                name += f", {SHORT_STATISTICS[one.statistics]}"
            style = STYLES[sum(t.outcome.subject is one.subject for t in tests) % len(STYLES)]
            unit = unit_of(one.subject.experiment.data)
            # A network may diverge, and its scores be no numbers.
            with np.errstate(invalid="ignore", over="ignore"):
                means, half = unit * one.means, unit * one.half_widths
            tests.append(Drawn(one, name, look._replace(style=style), means, half))
        result.append(Panel(shots, tests, papers_by_method(some)))
    return result


def papers_by_method(outcomes: Sequence[Outcome]) -> list[tuple[str, list[PaperScore]]]:
    """Return the paper's scores of tests, as they are read, for those of its methods there are."""
    unit = unit_of(outcomes[0].subject.experiment.data)
    found: dict[str, list[PaperScore]] = {}
    ours = {one.subject.method for one in outcomes}
    for score in papers_of(outcomes):
        if score.method in ours or score.method == "maml":
            read = score._replace(mean=unit * score.mean, half_width=unit * score.half_width)
            found.setdefault(score.method, []).append(read)
    return list(found.items())


def paper_look(method: str, panel: Panel) -> Look:
    """Return how a method's scores of the paper are drawn: as ours, dotted."""
    ours = [test.look for test in panel.tests if test.outcome.subject.method == method]
    known = method if method in SHADES else OTHERS[0]
    look = ours[0] if ours else Look(known, MARKERS.get(method, OTHER_MARKERS[0]), ":")
    return look._replace(style=":")


class Range(NamedTuple):
    """The part of an axis of scores that is shown."""

    low: float
    high: float
    log: bool


def range_of(panels: Sequence[Panel], problem: Problem) -> Range:
    """Return what is shown of some panels' scores, the same for all.

    All accuracies; of the errors every start, every best and the paper's, and of others those that
    leave room for these: a network that diverges leaves the picture.
    """
    needed: list[float] = []
    others: list[float] = []
    for panel in panels:
        for test in panel.tests:
            means, half = test.means, np.nan_to_num(test.half_widths)
            best = int(np.nanargmin(means)) if np.isfinite(means).any() else 0
            places = range(len(means)) if problem.classifies else dict.fromkeys((0, best))
            for at in places:
                needed += [
                    float(v) for v in (means[at] - half[at], means[at], means[at] + half[at])
                ]
            others += means.tolist()
        needed += [score.mean for _, scores in panel.papers for score in scores]
    return shown_range(needed, others, problem)


def shown_range(needed: Sequence[float], others: Sequence[float], problem: Problem) -> Range:
    """Return the range of an axis of scores.

    Args:
        needed: scores that must be in it.
        others: those that are in it if there is room.
        problem: whose they are.
    """
    wanted = [v for v in needed if math.isfinite(v)] or [0.0, 1.0]
    more = [v for v in others if math.isfinite(v)]
    if problem.classifies:
        low, high = readable_range(wanted, more)
        return Range(max(low, -2.0), min(high, 102.0), False)
    least = min((v for v in [*wanted, *more] if v > 0), default=1.0)
    largest = max(wanted)
    if largest / least > WIDE_SPREAD:
        wanted, more = ([math.log10(max(v, least)) for v in some] for some in (wanted, more))
        low, high = upside_down(wanted, more)
        return Range(10.0**low, 10.0**high, True)
    low, high = upside_down(wanted, more)
    return Range(max(low, 0.0) if min(wanted) >= 0 else low, high, False)


def upside_down(needed: Sequence[float], others: Sequence[float]) -> tuple[float, float]:
    """Return a readable range of numbers that are bad where they are high."""
    low, high = readable_range([-v for v in needed], [-v for v in others])
    return -high, -low


def labels_of(panels: Sequence[Panel], within: Range) -> dict[str, str]:
    """Return what a legend calls each test: its name, with what it comes to where it leaves the
    picture in any panel."""
    result = {}
    for name in dict.fromkeys(test.name for panel in panels for test in panel.tests):
        same = [test.means for panel in panels for test in panel.tests if test.name == name]
        means = np.concatenate(same)
        result[name] = name
        if not np.isfinite(means).all():
            result[name] += " (diverges)"
        elif means.max() > within.high:
            result[name] += f" (rises to {means.max():.3g})"
    return result


def across(test: Drawn, last: int) -> tuple[Floats, Floats, Floats]:
    """Return steps, means and half widths; the same all along, where no step is taken."""
    steps = np.arange(len(test.means), dtype=np.float64)
    if len(steps) > 1 or last == 0:
        return steps, test.means, test.half_widths
    return np.array([0.0, last]), test.means.repeat(2), test.half_widths.repeat(2)


def last_step(panels: Sequence[Panel]) -> int:
    """Return the most gradient steps in some panels."""
    return max(len(test.means) for panel in panels for test in panel.tests) - 1


def shots_words(problem: Problem, shots: int) -> str:
    """Return how many examples are adapted to, in words."""
    many = "s" * (shots > 1)
    return f"{shots} shot{many}" if problem.classifies else f"{shots} point{many}"


def test_words(panel: Panel) -> str:
    """Return what each test of a panel comes to, in words."""
    parts = []
    for test in panel.tests:
        classifies = test.outcome.subject.experiment.data.classifies
        first, last = (
            f"{shown(float(v), classifies)}{' %' * classifies}" for v in test.outcome.means[[0, -1]]
        )
        steps = len(test.means) - 1
        ends = f"from {first} to {last} {step_words(steps)}" if steps else f"{first}, no step taken"
        parts.append(f"{test.name} {ends}")
    return "; ".join(parts)


class Curve(NamedTuple):
    """A learning curve."""

    name: str
    style: str
    batches: bool
    """Whether it is of training batches, else of validation tasks."""
    iterations: Floats
    """(R,) done by then."""
    scores: Floats
    """(R,), as they are read."""


def curves_of(subject: Subject) -> list[Curve]:
    """Return a run's learning curves up to the checkpoint tested; none where it has none."""
    metrics = metrics_of(subject.path, subject.iterations)
    problem = subject.experiment.data
    measure, steps = measure_name(problem), subject.experiment.adaptation.inner_steps
    if not metrics:
        return []
    done = np.array(metrics["iteration"]) + 1.0
    wanted = [("training batches", "-", True, measure)]
    for step in dict.fromkeys((0, steps)):
        words = f", {step_words(step)}" if steps else ""
        style = "-" if step == steps else ":"
        wanted.append((f"validation tasks{words}", style, False, f"validation_{measure}_{step}"))
    return [
        Curve(name, style, batches, done, unit_of(problem) * np.array(metrics[column]))
        for name, style, batches, column in wanted
        if column in metrics
    ]


def curves_range(curves: Sequence[Sequence[Curve]], problem: Problem) -> Range:
    """Return the range of an axis that learning curves are drawn on."""
    values = [
        float(v) for some in curves for one in some for v in one.scores if math.isfinite(v)
    ] or [0.0]
    if problem.classifies:
        return shown_range(values, values, problem)
    # A curve falls far below its start, and now and then jumps far above it.
    ordinary = [v for v in values if v <= 3.0 * float(np.quantile(values, 0.95))]
    return shown_range(ordinary, ordinary, problem)
