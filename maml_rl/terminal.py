"""How a run is shown in a terminal or a log: progress, and what a test found."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from envs import TaskFamily
from maml_rl.comparison import Comparison, MethodScores, StepScores
from maml_rl.loop import Show, Watcher
from maml_rl.runs import Row
from maml_rl.sampler import Count


class Terminal(Console):
    """A console that training survives: a full disk or a closed pipe only ends what is shown."""

    def print(self, *objects: object, **named: Any) -> None:  # rich's own name
        """Print, if it can be written."""
        with suppress(OSError):
            super().print(*objects, **named)

    def on_broken_pipe(self) -> None:
        """Show nothing more, where rich would leave the program."""
        self.quiet = True


Words = Callable[[Row], str]
"""Puts a row of metrics into words."""


class Lines:
    """Prints a line for every row of metrics, for logs."""

    def __init__(self, console: Console, words: Words) -> None:
        self._console = console
        self._words = words

    def __enter__(self) -> Show:
        return self._begin

    def __exit__(self, *exception: object) -> None:
        return

    def _begin(self, name: str) -> Watcher:
        def show(row: Row, total: int) -> None:
            seconds = float(row["seconds_sampling"]) + float(row["seconds_updating"])
            self._console.print(
                f"{f'{name}: ' if name else ''}iteration {int(row['iteration']) + 1}/{total}  "
                f"{self._words(row)}  {seconds:.1f} s",
                highlight=False,
                soft_wrap=True,
            )

        return show


class Bar:
    """Shows a progress bar for every run, with the time left."""

    def __init__(self, console: Console, words: Words) -> None:
        self._words = words
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=console,
        )

    def __enter__(self) -> Show:
        self._progress.start()
        return self._begin

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def _begin(self, name: str) -> Watcher:
        task = self._progress.add_task(
            name or "training", total=None, numbers="first iteration ..."
        )

        def show(row: Row, total: int) -> None:
            self._progress.update(
                task,
                total=total,
                completed=int(row["iteration"]) + 1,
                numbers=self._words(row),
            )

        return show


class Silence:
    """Shows nothing."""

    def __enter__(self) -> Show:
        return lambda _: None

    def __exit__(self, *exception: object) -> None:
        return


def numbers_that_matter(row: Row) -> str:
    """Return an iteration's returns before and after adaptation, KL, and whether it was refused."""
    steps = sum(1 for name in row if name.startswith("return_") and not name.endswith("_sd")) - 1
    parts = [f"return {float(row['return_0']):.1f}"]
    if steps:
        parts = [
            f"return before {float(row['return_0']):.1f}",
            f"after {steps} step{'s' * (steps > 1)} {float(row[f'return_{steps}']):.1f}",
        ]
    parts.append(f"KL {float(row['kl']):.4f}")
    if row["refused_because"]:
        parts.append(f"update refused: {row['refused_because']}")
    if row["diverged_worlds"]:
        parts.append(f"{row['diverged_worlds']} simulations diverged")
    return ", ".join(parts)


def watching_runs(
    console: Console, quiet: bool, words: Words = numbers_that_matter
) -> Bar | Lines | Silence:
    """Return how to show progress here: bars on a terminal, lines elsewhere, or nothing."""
    if quiet:
        return Silence()
    return Bar(console, words) if console.is_terminal else Lines(console, words)


@contextmanager
def watching(
    console: Console, quiet: bool, words: Words = numbers_that_matter
) -> Iterator[Watcher | None]:
    """Show the progress of one run."""
    with watching_runs(console, quiet, words) as show:
        yield show("")


def step_words(steps: int) -> str:
    """Return "before adapting", "after 1 gradient step" and so on."""
    return "before adapting" if steps == 0 else f"after {steps} gradient step{'s' * (steps > 1)}"


def title_of(one: MethodScores, family: TaskFamily) -> str:
    """Return what was tested, and on which tasks."""
    protocol = family.protocol_name
    seen = family.finite_tasks is not None
    kinds = {
        "test": f"{one.tasks} test tasks that training never saw",
        "paper": f"the paper's own {one.tasks} test tasks",
        "chosen": f"{one.tasks} chosen task{'s' * (one.tasks > 1)}",
    }
    what = kinds.get(one.source, f"{one.tasks} tasks {one.source}")
    if one.source == "test" and seen:
        what = "fresh episodes of the training tasks"
    elif seen:
        what += ", fresh episodes of tasks trained on"
    if one.outside_training:
        some = "" if one.outside_training == one.tasks else f"{one.outside_training} of them "
        what += f", {some}outside the range trained on"
    return f"{family.name}{f' ({protocol} protocol)' if protocol else ''}: {what}"


class Figure(NamedTuple):
    """A column of the tables: what it is called, and how a step's cell reads."""

    name: str
    cell: Callable[[StepScores], str]


def evaluation_tables(compared: Comparison, family: TaskFamily) -> list[Table]:
    """Return what was tested, method by method, against gradient steps, and their differences.

    One table of figures for a single run; several have two, to fit into 80 columns.
    """
    scores = compared.scores
    returns = [
        Figure("return", lambda step: f"{step.mean:.1f}"),
        Figure("95 % interval", lambda step: interval(*step.interval)),
        Figure("IQM", lambda step: f"{step.interquartile_mean:.1f}"),
    ]
    if any(len(one.seeds) > 1 for one in scores):
        returns.append(Figure("IQM over runs", lambda step: interval(*step.interval_over_runs)))
    gains = [
        Figure("spread", lambda step: f"{step.sd_over_tasks:.1f}"),
        Figure("worse", lambda step: f"{step.share_worse:.0%}" if step.steps else ""),
    ]
    if any(not math.isnan(step.gap_closed) for one in scores for step in one.steps):
        gains.append(Figure("gap closed", gap))
    # What a task is judged by besides its return; by task where there are finitely many.
    for measure in family.measure_columns[:1] if family.finite_tasks is None else ():
        name = f"{measure.name}\n({measure.unit})"
        gains.append(Figure(name, lambda step: f"{step.measures[0]:.2f}"))
    heading = title_of(scores[0], family)
    parts = [(heading, returns + gains)]
    if len(scores) > 1 or len(scores[0].seeds) > 1:
        parts = [(heading, returns), ("What adapting does", gains)]
    tables = []
    for title, columns in parts:
        table = plain_table(title)
        heads = row_heads(scores, table)
        for column in columns:
            table.add_column(column.name, justify="right", overflow="fold")
        for head, step in rows_of(scores, heads):
            table.add_row(*head, *(column.cell(step) for column in columns))
        tables.append(table)
    if (by_task := task_table(scores, family)) is not None:
        tables.append(by_task)
    if (differences := difference_table(compared)) is not None:
        tables.append(differences)
    return tables


def gap(step: StepScores) -> str:
    """Return the share of the way to the oracle in words, "" where there is none."""
    return "" if step.steps == 0 or math.isnan(step.gap_closed) else f"{step.gap_closed:.2f}"


def task_table(scores: Sequence[MethodScores], family: TaskFamily) -> Table | None:
    """Return the returns of each of finitely many tasks; None where there are infinitely many."""
    groups = list(scores[0].steps[0].by_task)
    if not groups:
        return None
    measure = family.measure_columns[0] if family.measure_columns else None
    table = plain_table("By task")
    heads = row_heads(scores, table)
    for name in groups:
        table.add_column(f"{name}\nreturn", justify="right")
        if measure is not None:
            table.add_column(f"{name}\n{measure.unit}", justify="right")
    for head, step in rows_of(scores, heads):
        cells = [*head]
        for value, measures in step.by_task.values():
            cells.append(f"{value:.1f}")
            if measure is not None:
                cells.append(f"{measures[0]:.2f}")
        table.add_row(*cells)
    return table


def plain_table(title: str) -> Table:
    """Return an empty table, narrow enough for a terminal of 80 columns."""
    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )


def row_heads(scores: Sequence[MethodScores], table: Table) -> list[list[str]]:
    """Add the columns that say whose row it is, and return their cells for each method.

    One method needs none; several their names, and step sizes where one has several.
    """
    if len(scores) == 1:
        table.add_column("", overflow="fold")
        return [[]]
    table.add_column("method", overflow="fold")
    sizes = len({one.step_size for one in scores}) > 1
    if sizes:
        table.add_column("step size", justify="right")
    table.add_column("steps", justify="right")
    return [[one.name, *([one.step_size_words] if sizes else [])] for one in scores]


def rows_of(
    scores: Sequence[MethodScores], heads: Sequence[Sequence[str]]
) -> Iterator[tuple[list[str], StepScores]]:
    """Yield each number of gradient steps of each method, with the cells that name it."""
    for one, head in zip(scores, heads, strict=True):
        for step in one.steps:
            # A method's name stands beside its first row alone.
            named = [cell if step.steps == 0 else "" for cell in head]
            yield [*named, str(step.steps) if head else step_words(step.steps)], step


def interval(low: float, high: float) -> str:
    """Return an interval in words, "" where nothing is known of it."""
    digits = 0 if max(abs(low), abs(high)) >= 200 else 1
    return "" if math.isnan(low) else f"{low:.{digits}f} to {high:.{digits}f}"


def difference_table(compared: Comparison) -> Table | None:
    """Return how much more the first method returns than the others; None where it is alone."""
    if not compared.differences:
        return None
    first = compared.scores[0]
    table = plain_table(
        f"{first.name}, step size {first.step_size:g}, minus the others, task by task"
    )
    for name in ("method", "step size", "steps", "difference", "95 % interval"):
        table.add_column(name, justify="left" if name == "method" else "right", overflow="fold")
    before = None
    for one in compared.differences:
        other = one.method
        head = [other.name, other.step_size_words] if other is not before else ["", ""]
        before = other
        table.add_row(*head, str(one.steps), f"{one.mean:.1f}", interval(*one.interval))
    return table


ENOUGH: Mapping[Count, str] = {
    "episodes": "",
    "steps": ", and more until it has taken as many steps as they may have",
}
"""What is added to a number of episodes, by what is counted."""


def later_steps_note(scales: Mapping[str, float]) -> str:
    """Return in a sentence how large the steps after the first are.

    Args:
        scales: `evaluation.later_step_scale` of each method that takes more than one.
    """
    by_scale: dict[float, list[str]] = {}
    for method, scale in scales.items():
        by_scale.setdefault(scale, []).append(method)
    if len(by_scale) == 1:
        return f"Later steps have {next(iter(by_scale)):g} of the step size."
    each = (f"{', '.join(methods)} {scale:g}" for scale, methods in by_scale.items())
    return f"Later steps have of the step size: {'; '.join(each)}."


def evaluation_notes(compared: Comparison, family: TaskFamily) -> list[str]:
    """Return what a newcomer needs to read the tables, a sentence or two a line."""
    scores = compared.scores
    notes = [
        "Return: sum of an episode's rewards, mean over tasks, with its 95 % bootstrap interval.",
        "IQM: mean of the middle half. Spread: standard deviation over tasks. Worse: share of "
        "tasks that adapting made worse.",
        f"Before each gradient step a task's policy acts for {scores[0].episodes} episodes"
        f"{ENOUGH[scores[0].count]}, which are all that the step learns from.",
    ]
    if any(len(one.seeds) > 1 for one in scores):
        notes.append(
            "IQM over runs: its 95 % interval, runs resampled for each task on its own; how one "
            "training differs from another as a whole is not in it (by_seed in summary.json)."
        )
    if any(not math.isnan(step.gap_closed) for one in scores for step in one.steps):
        notes.append("Gap closed: share of the way from the return before to the oracle's.")
    if compared.differences:
        notes.append("Differences: the two can be told apart where the interval leaves out 0.")
    if family.finite_tasks is not None and family.measure_columns:
        measure = family.measure_columns[0]
        notes.append(f"{measure.unit}: mean {measure.name} the wanted way.")
    elif family.measure_columns:
        measure = family.measure_columns[0]
        notes.append(f"{measure.name.capitalize()}: mean over an episode's steps.")
    return notes
