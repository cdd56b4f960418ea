"""Tests read again from their files, evaluation.csv and summary.json; results.py writes them."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TypeVar

import numpy as np

from envs.family import Floats, TaskFamily
from maml_rl.comparison import METHODS, Outcome
from maml_rl.config import family_name
from maml_rl.errors import InputError, refusal
from maml_rl.evaluate import Evaluation
from maml_rl.results import SUMMARY, TABLE, long_form
from maml_rl.sampler import COUNTS

Test = TypeVar("Test")


@dataclass(frozen=True)
class RunTested:
    """A run as it was when it was tested."""

    method: str
    variant: str
    seed: int
    run: str
    """Name of its folder."""
    iterations: int
    env_steps: int
    seconds: float
    """Of sampling and updating in its training."""

    def __post_init__(self) -> None:
        """Check types, which a file may have wrong.

        Raises:
            ValueError: naming the entry.
        """
        for name, kinds in KINDS.items():
            value = getattr(self, name)
            if type(value) not in kinds:
                raise ValueError(f"{name} of a run is {value!r}")


KINDS: Mapping[str, tuple[type, ...]] = {
    **dict.fromkeys(("method", "variant", "run"), (str,)),
    **dict.fromkeys(("seed", "iterations", "env_steps"), (int,)),
    "seconds": (int, float),
}


@dataclass(frozen=True)
class Summary:
    """What summary.json says of where the figures come from."""

    versions: Mapping[str, str]
    runs: tuple[RunTested, ...]
    benchmark: str
    """Name of the benchmark that they are of, "" if of none."""
    reused: Mapping[str, str]
    """Of a benchmark, runs that `--reuse` gave, and where each was; by method and seed."""


def has_results(folder: Path) -> bool:
    """Whether a folder holds a test's files."""
    return (folder / TABLE).is_file() and (folder / SUMMARY).is_file()


def read_summary(folder: Path) -> Summary:
    """Read what a folder's summary.json says of runs and versions.

    Raises:
        InputError: if it cannot be read, or is damaged.
    """
    path = folder / SUMMARY
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        names = [item.name for item in fields(RunTested)]
        runs = tuple(RunTested(**{n: entry[n] for n in names}) for entry in found["runs"])
        made_with = {str(name): str(version) for name, version in found["versions"].items()}
        benchmark = found.get("benchmark", {"name": ""})["name"]
        reused = {str(name): str(where) for name, where in found.get("reused", {}).items()}
        return Summary(made_with, runs, str(benchmark), reused)
    except OSError as error:
        raise refusal(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise damaged(path, error) from error


def read_outcomes(folder: Path, family: TaskFamily) -> list[Outcome]:
    """Read the tests that a folder's evaluation.csv holds; the inverse of `long_form`.

    Args:
        folder: where it lies.
        family: whose tests they are.

    Raises:
        InputError: if it cannot be read, is damaged, or of another family.
    """
    return whole_tests(
        folder / TABLE,
        ("method", "variant", "step_size", "tasks", "seed"),
        lambda rows: outcome_from(rows, family),
        lambda outcomes: long_form(outcomes, family),
    )


def whole_tests(
    path: Path,
    test: Sequence[str],
    build: Callable[[Sequence[Mapping[str, str]]], Test],
    written: Callable[[Sequence[Test]], Iterable[Mapping[str, object]]],
    *,
    ignored: str = "",
) -> list[Test]:
    """Read the tests that an evaluation.csv holds, each of whose rows is there and in order.

    Args:
        path: the file.
        test: columns whose values tell one test from another.
        build: makes a test of its rows.
        written: makes rows of all tests again, which must be those of the file.
        ignored: a column in which they may differ.

    Raises:
        InputError: if it cannot be read or is damaged.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file, strict=True))
        groups: dict[tuple[str, ...], list[Mapping[str, str]]] = {}
        for row in rows:
            if None in row or None in row.values():
                raise ValueError("a row has other columns than the first")
            groups.setdefault(tuple(row[name] for name in test), []).append(row)
        outcomes = [build(group) for group in groups.values()]
        if not outcomes:
            raise ValueError("it has no rows")
        wanted = [{k: str(v) for k, v in row.items()} for row in written(outcomes)]
        for row in (*wanted, *rows) if ignored else ():
            del row[ignored]
    except OSError as error:
        raise refusal(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        raise damaged(path, error) from error
    if wanted != rows:
        raise damaged(path, "its rows are not those of whole tests")
    return outcomes


def outcome_from(rows: Sequence[Mapping[str, str]], family: TaskFamily) -> Outcome:
    """Return the test that rows of evaluation.csv are of.

    Raises:
        ValueError: if they are of none, or of another family.
        KeyError: if a column is missing.
    """
    first = rows[0]
    (count,) = (c for c in COUNTS if c == first["count"])
    (method,) = (m for m in METHODS if m == first["method"])
    if (first["family"], first["protocol"]) != (family_name(family), family.protocol_name):
        raise ValueError(f"it is of {first['family']} {first['protocol']}".rstrip())
    steps = int(rows[-1]["gradient_steps"]) + 1

    def column(name: str) -> Floats:
        return np.array([float(row[name]) for row in rows]).reshape(steps, -1)

    returns = column("return_mean")
    if not np.isfinite(returns).all():
        raise ValueError("a return is no finite number")
    tasks = np.stack([column(f"task_{c.name}")[0] for c in family.task_columns], axis=-1)
    for task in tasks:
        family.check_task(task)
    measures = [column(f"{c.name}_mean") for c in family.measure_columns]
    evaluation = Evaluation(
        tasks.astype(np.float32),
        returns,
        column("return_sd"),
        np.stack(measures, axis=-1) if measures else np.zeros((*returns.shape, 0)),
        int(first["episodes"]),
        count,
    )
    outside = column("outside_training")[0] > 0
    seed, size = int(first["seed"]), float(first["step_size"])
    return Outcome(method, first["variant"], seed, size, first["tasks"], evaluation, outside)


def damaged(path: Path, why: object) -> InputError:
    """Return what to say of a file of a test that cannot be used."""
    hint = "remove it and the other of the two, and make the test again"
    return refusal(f"{path} is damaged: {why}; {hint}")
