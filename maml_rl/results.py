"""What tests found, as files: evaluation.csv in long form, and summary.json.

evaluation.csv   a row a method, seed, step size, task and number of gradient steps
summary.json     a method's figures after each number of steps, and the runs they come from
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from envs.family import TaskFamily
from maml_rl.assess import Subject, Tester, outcomes_of, trials_here, under_settings
from maml_rl.checkpoints import as_json
from maml_rl.comparison import (
    Comparison,
    Difference,
    MethodScores,
    Outcome,
    StepScores,
)
from maml_rl.config import family_name
from maml_rl.errors import InputError, RunStopped
from maml_rl.runs import check_no_link, read_metrics, write_whole
from maml_rl.task_sets import held_out
from maml_rl.versions import versions

TABLE, SUMMARY = "evaluation.csv", "summary.json"
NEWEST: Mapping[str, object] = {"checkpoint": "latest"}
"""What summary.json says where nothing else was asked for."""

Cell = str | int | float


def write_own_test(subject: Subject, tester: Tester = trials_here) -> list[Outcome]:
    """Test a run's newest policy by its experiment's own settings, and write RUN/evaluation.

    Args:
        subject: the policy.
        tester: does the test.

    Raises:
        InputError: if the folder cannot be made.
        RunStopped: if the test breaks down or cannot be written.
    """
    settings = subject.trained.experiment.evaluation
    subjects = under_settings([subject], settings)
    tasks = held_out(subject.family, settings.tasks)
    outcomes = outcomes_of(subjects, tasks, {}, tester)
    folder = results_folder([subject.path], None, usual=True)
    write_results(folder, outcomes, Comparison.of(outcomes, subject.family), subjects, NEWEST)
    return outcomes


def results_folder(runs: Sequence[Path], out: Path | None, *, usual: bool) -> Path:
    """Make the folder for a test's files.

    `out`, or else `evaluation` in the run or beside the first of several; where the test is not
    the experiment's own, `evaluation-custom`, so that it does not take that one's place.

    Args:
        runs: those tested.
        out: where the user wants it.
        usual: whether the test is by the experiment's own settings.

    Raises:
        InputError: if it cannot be made.
    """
    if out is not None:
        folder = out
    else:
        above = runs[0] if len(runs) == 1 else runs[0].parent
        folder = above / ("evaluation" if usual else "evaluation-custom")
        check_no_link(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror}") from error
    return folder


def write_results(
    folder: Path,
    outcomes: Sequence[Outcome],
    compared: Comparison,
    subjects: Sequence[Subject],
    notes: Mapping[str, object],
) -> None:
    """Write evaluation.csv and summary.json.

    Args:
        folder: where to.
        outcomes: every test.
        compared: what they come to.
        subjects: the policies tested, of one family.
        notes: what else summary.json should say.

    Raises:
        RunStopped: if the disk does not take them.
    """
    family = subjects[0].family
    table = io.StringIO()
    rows = list(long_form(outcomes, family))
    writer = csv.DictWriter(table, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    settings = {s.method: asdict(s.trained.experiment.evaluation) for s in subjects}
    summary = {
        "family": family_name(family),
        "protocol": family.protocol_name,
        **notes,
        "settings": settings,
        "versions": versions(),
        "runs": [training_of(subject) for subject in subjects],
        "methods": [method_summary(one, family) for one in compared.scores],
        "differences": [difference_summary(one) for one in compared.differences],
    }
    try:
        write_whole(folder / TABLE, table.getvalue())
        write_whole(folder / SUMMARY, as_json(summary))
    except OSError as error:
        raise RunStopped(f"the test cannot be written to {folder}: {error.strerror}", 3) from error


def long_form(tested: Sequence[Outcome], family: TaskFamily) -> Iterator[dict[str, Cell]]:
    """Yield evaluation.csv: one row a method, seed, step size, task and number of steps."""
    columns = [c.name for c in family.task_columns]
    measures = [c.name for c in family.measure_columns]
    for one in tested:
        found = one.evaluation
        for step, returns in enumerate(found.returns):
            for task, value in enumerate(returns):
                numbers = zip(columns, found.tasks[task].tolist(), strict=True)
                means = zip(measures, found.measures[step, task].tolist(), strict=True)
                yield {
                    "family": family_name(family),
                    "protocol": family.protocol_name,
                    "method": one.method,
                    "seed": one.seed,
                    "task": task,
                    **{f"task_{name}": number for name, number in numbers},
                    "gradient_steps": step,
                    "return_mean": float(value),
                    "return_sd": float(found.return_sds[step, task]),
                    "episodes": found.episodes,
                    "count": found.count,
                    **{f"{name}_mean": number for name, number in means},
                    "step_size": one.step_size,
                    "variant": one.variant,
                    "tasks": one.source,
                    "outside_training": int(one.outside_training[task]),
                }


def training_of(subject: Subject) -> dict[str, object]:
    """Return what a policy's training took."""
    metrics_file = subject.path / "metrics.csv"
    metrics = read_metrics(metrics_file) if metrics_file.is_file() else {}
    done = slice(None, subject.iterations)
    seconds = [sum(metrics.get(f"seconds_{n}", ())[done]) for n in ("sampling", "updating")]
    return {
        "method": subject.method,
        "variant": subject.variant,
        "seed": subject.seed,
        "run": subject.path.name,
        "iterations": subject.iterations,
        "env_steps": subject.env_steps,
        "seconds": round(sum(seconds), 1),
    }


def method_summary(one: MethodScores, family: TaskFamily) -> dict[str, object]:
    """Return one method's figures as plain values."""
    return {
        "method": one.method,
        "variant": one.variant,
        "seeds": list(one.seeds),
        "step_size": one.step_size,
        "tasks": one.source,
        "task_count": one.tasks,
        "outside_training": one.outside_training,
        "episodes": one.episodes,
        "count": one.count,
        "gradient_steps": [step_summary(step, family) for step in one.steps],
    }


def step_summary(step: StepScores, family: TaskFamily) -> dict[str, object]:
    """Return the figures after one number of gradient steps; null for those that are unknown."""
    names = [c.name for c in family.measure_columns]
    return {
        "steps": step.steps,
        "return": step.mean,
        "interval_95": known(*step.interval),
        "by_seed": list(step.by_seed),
        "sd_over_tasks": step.sd_over_tasks,
        "interquartile_mean": step.interquartile_mean,
        "interval_95_over_runs": known(*step.interval_over_runs),
        "share_worse": step.share_worse,
        "gap_closed": step.gap_closed,
        **dict(zip(names, step.measures.tolist(), strict=True)),
        "by_task": {
            task: {"return": value, **dict(zip(names, measures.tolist(), strict=True))}
            for task, (value, measures) in step.by_task.items()
        },
    }


def difference_summary(one: Difference) -> dict[str, object]:
    """Return how much more the first method returned than another, as plain values."""
    other = one.method
    return {
        "than": other.method,
        "variant": other.variant,
        "step_size": other.step_size,
        "steps": one.steps,
        "difference": one.mean,
        "interval_95": known(*one.interval),
    }


def known(low: float, high: float) -> list[float] | None:
    """Return an interval's bounds, None where nothing is known of them."""
    return None if math.isnan(low) else [low, high]
