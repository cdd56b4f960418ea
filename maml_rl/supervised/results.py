"""What tests found, as files and as tables for a terminal.

evaluation.csv   a row a run, number of shots, kind of batch normalisation, task and gradient steps
summary.json     means and 95 % intervals after each number of steps, and the runs they come from
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.table import Table

from maml_rl.checkpoints import as_json
from maml_rl.errors import RunStopped
from maml_rl.results import SUMMARY, TABLE
from maml_rl.runs import read_metrics, write_whole
from maml_rl.supervised.config import TestSettings
from maml_rl.supervised.evaluate import Outcome, Subject, kind_of
from maml_rl.supervised.paper import PaperScore, paper_scores
from maml_rl.supervised.trained import measure_name
from maml_rl.terminal import plain_table, step_words
from maml_rl.versions import versions

Cell = str | int | float


def long_form(outcomes: Sequence[Outcome]) -> Iterator[dict[str, Cell]]:
    """Yield the rows of evaluation.csv."""
    for one in outcomes:
        experiment = one.subject.experiment
        measure = measure_name(experiment.data)
        for task in range(one.scores.shape[1]):
            for step in range(len(one.scores)):
                yield {
                    "problem": experiment.data.name,
                    "method": one.subject.method,
                    "run": one.subject.path.resolve().name,
                    "seed": experiment.seed,
                    "shots": one.shots,
                    "batch_norm": one.statistics,
                    "step_size": one.step_size,
                    "task": task,
                    "gradient_steps": step,
                    measure: float(f"{one.scores[step, task]:.6g}"),
                    "loss": float(f"{one.losses[step, task]:.6g}"),
                }


def write_results(
    folder: Path,
    outcomes: Sequence[Outcome],
    settings: TestSettings,
    notes: Mapping[str, object],
) -> None:
    """Write evaluation.csv and summary.json.

    Args:
        folder: where to.
        outcomes: every test.
        settings: that they were made by.
        notes: what else summary.json should say.

    Raises:
        RunStopped: if the disk does not take them.
    """
    rows = list(long_form(outcomes))
    table = io.StringIO()
    writer = csv.DictWriter(table, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    subjects = list({id(one.subject): one.subject for one in outcomes}.values())
    problem = subjects[0].experiment.data
    summary = {
        "problem": problem.name,
        "kind": kind_of(problem),
        "measure": measure_name(problem),
        **notes,
        "settings": asdict(settings),
        "tests": [summary_of(one) for one in outcomes],
        "paper": [score._asdict() for score in papers_of(outcomes)],
        "runs": [training_of(subject) for subject in subjects],
        "versions": dict(versions()),
    }
    try:
        write_whole(folder / TABLE, table.getvalue())
        write_whole(folder / SUMMARY, as_json(summary))
    except OSError as error:
        raise RunStopped(
            f"the results cannot be written to {folder}: {error.strerror}", 3
        ) from error


def summary_of(one: Outcome) -> dict[str, object]:
    """Return what a test comes to, as plain values; null where nothing is known."""
    return {
        "method": one.subject.method,
        "run": one.subject.path.resolve().name,
        "shots": one.shots,
        "batch_norm": one.statistics or None,
        "step_size": one.step_size,
        "tasks": one.scores.shape[1],
        "gradient_steps": [
            {
                "steps": step,
                "mean": float(one.means[step]),
                "half_width_95": float(one.half_widths[step]),
                "sd_over_tasks": float(one.sds[step]),
            }
            for step in range(len(one.scores))
        ],
    }


def papers_of(outcomes: Sequence[Outcome]) -> list[PaperScore]:
    """Return the paper's scores for the kinds of test there are, each once."""
    found = (
        score
        for one in outcomes
        for score in paper_scores(one.subject.experiment, one.shots)
        if score.steps < len(one.scores)
    )
    return list(dict.fromkeys(found))


def training_of(subject: Subject) -> dict[str, object]:
    """Return what a network's training took."""
    file = subject.path / "metrics.csv"
    metrics = read_metrics(file) if file.is_file() else {}
    numbers = metrics.get("iteration", ())
    done = [i for i, number in enumerate(numbers) if number < subject.iterations]
    seconds = sum(
        metrics[name][i]
        for name in ("seconds_sampling", "seconds_updating", "seconds_validating")
        for i in done
    )
    return {
        "method": subject.method,
        "run": subject.path.resolve().name,
        "seed": subject.experiment.seed,
        "iterations": subject.iterations,
        "tasks": subject.iterations * subject.experiment.outer.tasks,
        "seconds": round(seconds, 1),
    }


STATISTICS: Mapping[str, str] = {
    "": "",
    "batch": "batch norm by the query's statistics (transductive)",
    "support": "batch norm by the support's statistics",
}
"""What batch normalisation went by, in words."""


def score_words(value: float, half_width: float, *, classifies: bool) -> str:
    """Return a score with its interval: accuracy in percent, or an error."""
    around = "" if math.isnan(half_width) else f" ± {shown(half_width, classifies)}"
    return f"{shown(value, classifies)}{around}"


def shown(value: float, classifies: bool) -> str:
    """Return one number of a score."""
    return (
        f"{100 * value:.2f}" if classifies else f"{value:.3g}" if value >= 100 else f"{value:.3f}"
    )


def tables_of(outcomes: Sequence[Outcome]) -> list[Table]:
    """Return score against gradient steps: a table for each kind of test, a column a network."""
    problem = outcomes[0].subject.experiment.data
    unit = "accuracy, %" if problem.classifies else "mean squared error"
    kinds = dict.fromkeys((one.shots, one.statistics) for one in outcomes)
    tables = []
    for shots, statistics in kinds:
        some = [one for one in outcomes if (one.shots, one.statistics) == (shots, statistics)]
        heading = f"{kind_of(problem)}, {shots} shot{'s' * (shots > 1)}: {unit}"
        words = STATISTICS[statistics]
        table = plain_table(heading + (f"\n{words}" if words else ""))
        papers = papers_to_show(some)
        names = [*column_names(some), *(f"the paper's {method}" for method in papers)]
        # Words leave no room for more than two columns beside them.
        wide = len(names) > 2
        table.add_column("steps" if wide else "", justify="right" if wide else "left")
        for number, name in enumerate(names):
            # As wide as a score with its interval, where there is one.
            width = 13 if number < len(some) else None
            table.add_column(name, justify="right", overflow="fold", min_width=width)
        for step in range(max(len(one.scores) for one in some)):
            ours = [
                (one.means[step], one.half_widths[step]) if step < len(one.scores) else None
                for one in some
            ]
            theirs = [points.get(step) for points in papers.values()]
            cells = [
                score_words(*found, classifies=problem.classifies) if found else ""
                for found in (*ours, *theirs)
            ]
            table.add_row(str(step) if wide else step_words(step), *cells)
        tables.append(table)
    return tables


def papers_to_show(outcomes: Sequence[Outcome]) -> dict[str, dict[int, tuple[float, float]]]:
    """Return the paper's score and half an interval's width by method and gradient steps.

    Of the methods that are tested, or of all where it has none of those.
    """
    found: dict[str, dict[int, tuple[float, float]]] = {}
    for point in papers_of(outcomes):
        found.setdefault(point.method, {})[point.steps] = (point.mean, point.half_width)
    tested = {one.subject.method for one in outcomes}
    return {method: points for method, points in found.items() if method in tested} or found


def column_names(outcomes: Sequence[Outcome]) -> list[str]:
    """Return what each test of one kind is called: its method, with what tells equal ones apart."""
    methods = [one.subject.method for one in outcomes]
    runs = [one.subject.path.resolve().name for one in outcomes]
    names = []
    for one, method, run in zip(outcomes, methods, runs, strict=True):
        alike = [other for other, m in zip(runs, methods, strict=True) if m == method]
        name = method if len(set(alike)) == 1 else run
        names.append(f"{name}, step size {one.step_size:g}" if alike.count(run) > 1 else name)
    return names


def notes_of(outcomes: Sequence[Outcome]) -> list[str]:
    """Return what a newcomer needs to read the tables, a sentence a line."""
    first = outcomes[0]
    problem = first.subject.experiment.data
    what = "accuracy" if problem.classifies else "squared error"
    unseen = "of classes " if problem.classifies else ""
    notes = [
        f"Mean {what} over {first.scores.shape[1]} test tasks {unseen}that training never saw, "
        "± 1.96 standard deviations / sqrt(tasks).",
    ]
    moved: dict[tuple[str, int], set[float]] = {}
    for one in outcomes:
        if chosen(one):
            moved.setdefault((one.subject.method, one.shots), set()).add(one.step_size)
    # Several of one network stand in its columns' names.
    notes += [
        f"Step size of {method} from {shots} shots in the test: {min(sizes):g}."
        for (method, shots), sizes in moved.items()
        if len(sizes) == 1
    ]
    return notes


def chosen(one: Outcome) -> bool:
    """Whether a test's step size is not the one trained with."""
    return not math.isclose(one.step_size, one.subject.experiment.adaptation.step_size)
