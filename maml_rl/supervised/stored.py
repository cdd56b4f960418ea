"""Tests read again from their files, evaluation.csv and summary.json; results.py writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from maml_rl.errors import refusal
from maml_rl.results import SUMMARY, TABLE
from maml_rl.stored import damaged, has_results, whole_tests
from maml_rl.supervised.config import TestSettings
from maml_rl.supervised.evaluate import Outcome, Subject
from maml_rl.supervised.results import long_form
from maml_rl.supervised.trained import measure_name

EVALUATION = "evaluation"
"""Folder of a run's own test."""


def holds_supervised(folder: Path) -> bool:
    """Whether a folder holds a test's files, and it is one of supervised runs."""
    if not has_results(folder):
        return False
    try:
        return "measure" in json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, RecursionError):
        # Told where it is used.
        return False


class StoredTest(NamedTuple):
    """A run's own test."""

    outcomes: list[Outcome]
    versions: Mapping[str, str]
    """What it was made with."""


def stored_test(subject: Subject) -> StoredTest | None:
    """Return the test in RUN/evaluation.

    None where there is none, or one of another checkpoint or by other settings than the run's.

    Raises:
        InputError: if its files are damaged.
    """
    folder = subject.path / EVALUATION
    if not has_results(folder):
        return None
    path = folder / SUMMARY
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        (tested, *others) = summary["runs"]
        then = [tested[name] for name in ("method", "seed", "iterations")]
        now = [subject.method, subject.experiment.seed, subject.iterations]
        # As JSON says them.
        wanted = json.loads(json.dumps(asdict(subject.experiment.evaluation)))
        settings = summary["settings"]
        versions = {str(name): str(version) for name, version in summary["versions"].items()}
    except OSError as error:
        raise refusal(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise damaged(path, error) from error
    if others or then != now or settings != wanted:
        return None
    outcomes = read_outcomes(folder / TABLE, subject, subject.experiment.evaluation)
    return None if outcomes is None else StoredTest(outcomes, versions)


def read_outcomes(path: Path, subject: Subject, settings: TestSettings) -> list[Outcome] | None:
    """Read the tests of one network that an evaluation.csv holds; the inverse of `long_form`.

    None where they are not the number of tasks and steps that the settings say.

    Raises:
        InputError: if it cannot be read or is damaged.
    """
    outcomes = whole_tests(
        path,
        ("shots", "batch_norm", "step_size"),
        lambda rows: outcome_from(rows, subject),
        long_form,
        # A run folder may be called otherwise by now.
        ignored="run",
    )
    shots = settings.shots or (subject.experiment.data.shots,)
    whole = all(one.scores.shape[1] == settings.tasks for one in outcomes)
    return outcomes if whole and {one.shots for one in outcomes} == set(shots) else None


def outcome_from(rows: Sequence[Mapping[str, str]], subject: Subject) -> Outcome:
    """Return the test that rows of evaluation.csv, task by task, are of.

    Raises:
        ValueError: if they are of none.
        KeyError: if a column is missing.
    """
    first = rows[0]
    steps = int(rows[-1]["gradient_steps"]) + 1
    scores, losses = (
        np.array([float(row[name]) for row in rows]).reshape(-1, steps).T
        for name in (measure_name(subject.experiment.data), "loss")
    )
    return Outcome(
        subject, int(first["shots"]), first["batch_norm"], float(first["step_size"]), scores, losses
    )
