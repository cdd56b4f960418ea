"""How a run is shown in a terminal or a log: progress, and what a test found."""

from __future__ import annotations

import math
from contextlib import suppress
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from envs import TaskFamily
from maml_rl.evaluate import Evaluation
from maml_rl.runs import Row
from maml_rl.train import Watcher


class Terminal(Console):
    """A console that training survives: a full disk or a closed pipe only ends what is shown."""

    def print(self, *objects: object, **named: Any) -> None:  # rich's own name
        """Print, if it can be written."""
        with suppress(OSError):
            super().print(*objects, **named)

    def on_broken_pipe(self) -> None:
        """Show nothing more, where rich would leave the program."""
        self.quiet = True


class Lines:
    """Prints one line an iteration, for logs."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def __enter__(self) -> Watcher:
        return self.show

    def __exit__(self, *exception: object) -> None:
        return

    def show(self, row: Row, total: int) -> None:
        """Print one iteration."""
        seconds = float(row["seconds_sampling"]) + float(row["seconds_updating"])
        self._console.print(
            f"iteration {int(row['iteration']) + 1}/{total}  {numbers_that_matter(row)}  "
            f"{seconds:.1f} s",
            highlight=False,
            soft_wrap=True,
        )


class Bar:
    """Shows a progress bar with the time left."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=console,
        )
        self._task = self._progress.add_task("", total=None, numbers="first iteration ...")

    def __enter__(self) -> Watcher:
        self._progress.start()
        return self.show

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def show(self, row: Row, total: int) -> None:
        """Move the bar by one iteration."""
        self._progress.update(
            self._task,
            total=total,
            completed=int(row["iteration"]) + 1,
            numbers=numbers_that_matter(row),
        )


class Silence:
    """Shows nothing."""

    def __enter__(self) -> None:
        return

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


def watching(console: Console, quiet: bool) -> Bar | Lines | Silence:
    """Return how to show progress here: a bar on a terminal, lines elsewhere, or nothing."""
    if quiet:
        return Silence()
    return Bar(console) if console.is_terminal else Lines(console)


def step_words(steps: int) -> str:
    """Return "before adapting", "after 1 gradient step" and so on."""
    return "before adapting" if steps == 0 else f"after {steps} gradient step{'s' * (steps > 1)}"


def evaluation_table(evaluation: Evaluation, family: TaskFamily) -> Table:
    """Return return against gradient steps as a table in plain words."""
    measure = family.measure_columns[0] if family.measure_columns else None
    groups = list(evaluation.groups(family))
    title = (
        f"How {family.name} does on {len(evaluation.tasks)} test tasks that training never saw"
        if family.finite_tasks is None
        else f"How {family.name} does on fresh episodes of the training tasks"
    )
    # Narrow enough for a terminal of 80 columns with two kinds of task.
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    table.add_column("", no_wrap=True)
    table.add_column("return", justify="right", no_wrap=True)
    if measure is not None and not groups:
        table.add_column(f"{measure.name} ({measure.unit})", justify="right")
    for name, _ in groups:
        table.add_column(f"{name}\nreturn", justify="right")
        if measure is not None:
            table.add_column(f"{name}\n{measure.unit}", justify="right")
    for step, returns in enumerate(evaluation.returns):
        width = evaluation.half_width(family, step)
        interval = "" if math.isnan(width) else f" ± {width:.1f}"
        cells = [step_words(step), f"{returns.mean():.1f}{interval}"]
        if measure is not None and not groups:
            cells.append(f"{evaluation.measures[step, :, 0].mean():.2f}")
        for _, mask in groups:
            cells.append(f"{returns[mask].mean():.1f}")
            if measure is not None:
                cells.append(f"{evaluation.measures[step, mask, 0].mean():.2f}")
        table.add_row(*cells)
    return table


def evaluation_notes(evaluation: Evaluation, family: TaskFamily) -> str:
    """Return what a newcomer needs to read the table."""
    notes = [
        "Return: sum of an episode's rewards, mean over tasks, ± half its 95 % interval.",
        f"Before each gradient step a task's policy acts for {evaluation.episodes} episodes, "
        "which are all that the step learns from.",
    ]
    if family.finite_tasks is not None and family.measure_columns:
        measure = family.measure_columns[0]
        notes.append(f"{measure.unit}: mean {measure.name} the wanted way.")
    return " ".join(notes)
