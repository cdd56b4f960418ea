"""The tables of a report: what tests found, in numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from envs.family import TaskFamily
from maml_rl.comparison import Comparison, MethodScores, StepScores
from maml_rl.paper import Point
from maml_rl.terminal import gap, interval


class Cell(NamedTuple):
    """One number of a table as it is read, and as it is."""

    text: str
    value: float = math.nan


class Row(NamedTuple):
    """A line of a table."""

    head: str
    cells: list[Cell]


class Group(NamedTuple):
    """Lines of one method."""

    name: str
    step_size: str
    rows: list[Row]


class Table(NamedTuple):
    """A table of groups of lines; the first three columns are method, step size and steps."""

    caption: str
    columns: list[str]
    groups: list[Group]


class Column(NamedTuple):
    """What a column is called and how a number of gradient steps fills it."""

    name: str
    cell: Callable[[StepScores], Cell]


NOTHING = Cell("")


def number(text: str, value: float) -> Cell:
    """Return a cell that is empty where nothing is known."""
    return NOTHING if math.isnan(value) else Cell(text, value)


def scores_table(
    compared: Comparison, papers: Mapping[str, Sequence[Point]], family: TaskFamily
) -> Table:
    """Return the table of every method after every number of gradient steps."""
    scores = compared.scores
    columns = [
        Column("return", lambda s: Cell(f"{s.mean:.1f}", s.mean)),
        Column("95 % interval", lambda s: Cell(interval(*s.interval))),
        Column("IQM", lambda s: Cell(f"{s.interquartile_mean:.1f}", s.interquartile_mean)),
    ]
    if any(len(one.seeds) > 1 for one in scores):
        columns.append(
            Column("IQM over runs, 95 %", lambda s: Cell(interval(*s.interval_over_runs)))
        )
    columns += [
        Column("spread", lambda s: Cell(f"{s.sd_over_tasks:.1f}", s.sd_over_tasks)),
        Column("worse", lambda s: number(f"{s.share_worse:.0%}", s.share_worse)),
    ]
    if any(not math.isnan(step.gap_closed) for one in scores for step in one.steps):
        columns.append(Column("gap closed", lambda s: number(gap(s), s.gap_closed)))
    # By task where there are finitely many.
    for measure in family.measure_columns[:1] if family.finite_tasks is None else ():
        name = f"{measure.name} ({measure.unit})"
        columns.append(Column(name, lambda s: number(f"{s.measures[0]:.2f}", s.measures[0])))
    groups = [group_of(one, columns) for one in scores]
    empty = [NOTHING] * len(columns)
    at = {column.name: place for place, column in enumerate(columns)}
    for method, points in papers.items():
        rows = []
        for point in points:
            cells = [*empty]
            cells[at["return"]] = Cell(f"{point.mean:.1f}", point.mean)
            cells[at["spread"]] = Cell(f"{point.sd_over_tasks:.1f}", point.sd_over_tasks)
            rows.append(Row(str(point.steps), cells))
        groups.append(Group(f"{method}, the paper's", "", rows))
    return Table("Return against gradient steps", [column.name for column in columns], groups)


def group_of(one: MethodScores, columns: Sequence[Column]) -> Group:
    """Return the lines of one method."""
    rows = [Row(str(s.steps), [column.cell(s) for column in columns]) for s in one.steps]
    return Group(one.name, one.step_size_words, rows)


def by_task_table(scores: Sequence[MethodScores], family: TaskFamily) -> Table | None:
    """Return the returns of each of finitely many tasks; None where there are infinitely many."""
    names = list(scores[0].steps[0].by_task)
    if not names:
        return None
    measure = family.measure_columns[0] if family.measure_columns else None
    columns = []
    for name in names:
        columns += [f"{name}, return", *([f"{name}, {measure.unit}"] if measure else [])]
    groups = []
    for one in scores:
        rows = []
        for step in one.steps:
            cells = []
            for value, measures in step.by_task.values():
                cells.append(Cell(f"{value:.1f}", value))
                if measure:
                    cells.append(number(f"{measures[0]:.2f}", float(measures[0])))
            rows.append(Row(str(step.steps), cells))
        groups.append(Group(one.name, one.step_size_words, rows))
    return Table("By task", columns, groups)


def by_seed_table(scores: Sequence[MethodScores]) -> Table | None:
    """Return the mean return of each run; None where every method has one alone."""
    if all(len(one.seeds) == 1 for one in scores):
        return None
    seeds = sorted({seed for one in scores for seed in one.seeds})
    groups = []
    for one in scores:
        rows = []
        for step in one.steps:
            found = dict(zip(one.seeds, step.by_seed, strict=True))
            cells = [
                Cell(f"{found[seed]:.1f}", found[seed]) if seed in found else NOTHING
                for seed in seeds
            ]
            rows.append(Row(str(step.steps), cells))
        groups.append(Group(one.name, one.step_size_words, rows))
    return Table("By seed: mean return of each run", [f"seed {seed}" for seed in seeds], groups)


def differences_table(compared: Comparison) -> Table | None:
    """Return how much more the first method returns than the others; None where it is alone."""
    if not compared.differences:
        return None
    first = compared.scores[0]
    groups: dict[int, Group] = {}
    for one in compared.differences:
        other = one.method
        group = groups.setdefault(id(other), Group(other.name, other.step_size_words, []))
        cells = [Cell(f"{one.mean:.1f}", one.mean), Cell(interval(*one.interval))]
        group.rows.append(Row(str(one.steps), cells))
    caption = f"{first.name}, step size {first.step_size:g}, minus the others, task by task"
    return Table(caption, ["difference", "95 % interval"], list(groups.values()))
