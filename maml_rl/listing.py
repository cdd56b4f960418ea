"""What `maml-rl list` shows: families and their settings, experiments and policies that ship."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

import envs
from envs import TaskFamily
from maml_rl.config import (
    load_experiment,
    nearest,
    shipped_benchmarks,
    shipped_experiments,
    shipped_folder,
    shipped_policies,
    shipped_supervised,
)
from maml_rl.stored import read_outcomes, read_summary
from maml_rl.supervised.config import PROBLEMS


def show_families(console: Console) -> None:
    """Print every family with its tasks, measures and settings."""
    for name, cls in envs.FAMILIES.items():
        family = envs.make(name)
        told = [
            f"{title}: " + "; ".join(f"{c.name} ({c.unit}): {c.meaning}" for c in columns)
            for title, columns in (
                ("task", family.task_columns),
                ("measured", family.measure_columns),
            )
        ]
        values = {item.name: getattr(family, item.name) for item in dataclasses.fields(family)}
        defaults = {n: f"{v}{other_protocols(family, n, v)}" for n, v in values.items()}
        show_class(console, name, cls, told, defaults)


def show_problems(console: Console) -> None:
    """Print every supervised problem with its settings."""
    for name, cls in PROBLEMS.items():
        problem = cls()
        values = {item.name: getattr(problem, item.name) for item in dataclasses.fields(problem)}
        defaults = {n: str(v) if v != "" else '""' for n, v in values.items()}
        show_class(console, name, cls, [], defaults)


def show_class(
    console: Console, name: str, cls: type, told: Sequence[str], defaults: Mapping[str, str]
) -> None:
    """Print a family or a problem.

    Args:
        console: where to.
        name: of it.
        cls: its class; the first line of its docstring, and those of its fields, are shown.
        told: lines about it.
        defaults: each field's, in words.
    """
    console.print(f"\n{name}", style="bold", highlight=False)
    for line in ((cls.__doc__ or "").splitlines()[0], *told):
        console.print(f"  {line}", highlight=False, soft_wrap=True, markup=False)
    table = Table(box=None, pad_edge=False, show_header=True)
    for heading in ("  field", "default", "meaning and unit"):
        table.add_column(heading)
    meanings = field_meanings(cls)
    for field, default in defaults.items():
        table.add_row(f"  {field}", default, meanings.get(field, ""))
    console.print(table)


def show_experiments(console: Console) -> None:
    """Print every experiment and benchmark that ships, with its file's first sentence."""
    for title, files in (
        ("Experiments that ship (maml-rl train NAME)", shipped_experiments()),
        ("Supervised experiments that ship (maml-rl train NAME)", shipped_supervised()),
        ("Benchmarks that ship (maml-rl benchmark NAME)", shipped_benchmarks()),
    ):
        console.print(f"\n{title}", style="bold")
        table = Table(box=None, pad_edge=False, show_header=False)
        for name, path in files.items():
            table.add_row(f"  {name}", first_sentence(path))
        console.print(table)


def first_sentence(path: Path) -> str:
    """Return the first sentence of the comment that a file begins with."""
    lines = path.read_text(encoding="utf-8").splitlines()
    comment = itertools.takewhile(lambda line: line.startswith("#"), lines)
    # Not at "et al. 2017".
    return re.split(r"(?<=\.) (?=[A-Z])", " ".join(line.lstrip("# ") for line in comment))[0]


def show_policies(console: Console) -> None:
    """Print every trained policy that ships, with what its own test gave."""
    console.print("\nTrained policies that ship (maml-rl render NAME)", style="bold")
    table = Table(box=None, pad_edge=False)
    table.add_column("  name", no_wrap=True)
    # A protocol that is not the paper's is in the name, and 80 columns hold no more.
    for heading in ("iterations", "before", "1 step", "2 steps", "3 steps"):
        table.add_column(heading, justify="right", no_wrap=True)
    for path in shipped_policies().values():
        family = load_experiment(path / "config.yaml").family
        (outcome,) = read_outcomes(path / "evaluation", family)
        (tested,) = read_summary(path / "evaluation").runs
        means = outcome.evaluation.returns.mean(axis=1)
        returns = [f"{mean:.1f}" for mean in means]
        table.add_row(f"  {path.name}", str(tested.iterations), *returns)
    console.print(table)
    told = (
        f"  in {nearest(shipped_folder() / 'checkpoints')}; mean return over test tasks before and "
        "after gradient steps, which maml-rl evaluate NAME measures again; the gymnasium "
        "protocol's compare with their own kind alone"
    )
    console.print(told, highlight=False, soft_wrap=True)


def other_protocols(family: TaskFamily, field: str, value: object) -> str:
    """Return what the other protocols decide for a field, in brackets, where it differs."""
    tables: Mapping[str, Mapping[str, object]] = getattr(family, "protocols", {})
    own = family.protocol_name
    others = [
        f"{name}: {decided[field]}"
        for name, decided in tables.items()
        if name != own and field in decided and decided[field] != value
    ]
    return f" ({', '.join(others)})" if others else ""


def field_meanings(cls: type) -> dict[str, str]:
    """Return the docstring below each field of a dataclass and its bases."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(body, ast.ClassDef)
        for line, after in itertools.pairwise(body.body):
            if (
                isinstance(line, ast.AnnAssign)
                and isinstance(line.target, ast.Name)
                and isinstance(after, ast.Expr)
                and isinstance(after.value, ast.Constant)
            ):
                found[line.target.id] = " ".join(str(after.value.value).split())
    return found
