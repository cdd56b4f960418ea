"""Print the returns of two training runs side by side, at equal numbers of control steps.

    python experiments/results/compare_curves.py RUN OTHER

A row is a tenth of the control steps that both have taken: the mean return of the batches in it
after adaptation and, in brackets, their number; and the difference, with the standard error that
the spread of the batches gives it. It says nothing of how much two seeds of one setting differ.
"""

from __future__ import annotations

import csv
import math
import statistics
import sys
from pathlib import Path

ROWS = 10


def read(run: Path) -> list[dict[str, float]]:
    """Return the numbers of a run's metrics.csv, row by row."""
    names = ("env_steps", "return_1")
    with (run / "metrics.csv").open(newline="", encoding="utf-8") as file:
        return [{name: float(row[name]) for name in names} for row in csv.DictReader(file)]


def between(rows: list[dict[str, float]], low: float, high: float) -> list[float]:
    """Return the returns after adaptation between two numbers of control steps."""
    return [row["return_1"] for row in rows if low < row["env_steps"] <= high]


def mean(values: list[float]) -> str:
    """Return a mean and how many it is of."""
    return f"{statistics.fmean(values):.1f} ({len(values)})" if values else "-"


def difference(one: list[float], other: list[float]) -> str:
    """Return the difference of two means with its standard error."""
    if min(len(one), len(other)) < 2:
        return "-"
    error = math.sqrt(sum(statistics.variance(v) / len(v) for v in (one, other)))
    return f"{statistics.fmean(one) - statistics.fmean(other):+.1f} +- {error:.1f}"


def main(paths: list[str]) -> None:
    """Compare the two runs named on the command line."""
    if len(paths) != 2:
        raise SystemExit(__doc__)
    runs = [read(Path(path)) for path in paths]
    shared = min(rows[-1]["env_steps"] for rows in runs)
    print("Mean return of training batches after one gradient step (their number)")
    names = "  ".join(f"{Path(path).name:>28}" for path in paths)
    print(f"{'million control steps':>22}  {names}  {'difference':>16}")
    for part in range(ROWS):
        low, high = shared * part / ROWS, shared * (part + 1) / ROWS
        one, other = (between(rows, low, high) for rows in runs)
        cells = f"{mean(one):>28}  {mean(other):>28}  {difference(one, other):>16}"
        print(f"{high / 1e6:22.1f}  {cells}")
    for path, rows in zip(paths, runs, strict=True):
        last = [row["return_1"] for row in rows[-10:]]
        print(
            f"{path}: {len(rows)} iterations, {rows[-1]['env_steps'] / 1e6:.1f} million control "
            f"steps; {mean(last)} after one step at the end"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
