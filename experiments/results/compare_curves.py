"""Print the returns of two training runs side by side, at equal numbers of control steps.

    python experiments/results/compare_curves.py RUN OTHER

A row is a tenth of the control steps that both have taken: the mean return of the batches in it
after adaptation and, in brackets, their number; and the difference, with the standard error that
the spread of the batches gives it. It says nothing of how much two seeds of one setting differ.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from maml_rl.runs import read_metrics

ROWS = 10


def between(metrics: Mapping[str, Sequence[float]], low: float, high: float) -> list[float]:
    """Return the returns after adaptation between two numbers of control steps."""
    rows = zip(metrics["env_steps"], metrics["return_1"], strict=True)
    return [after for steps, after in rows if low < steps <= high]


def mean(values: Sequence[float]) -> str:
    """Return a mean and how many it is of."""
    return f"{statistics.fmean(values):.1f} ({len(values)})" if values else "-"


def difference(one: Sequence[float], other: Sequence[float]) -> str:
    """Return the difference of two means with its standard error."""
    if min(len(one), len(other)) < 2:
        return "-"
    error = math.sqrt(sum(statistics.variance(v) / len(v) for v in (one, other)))
    return f"{statistics.fmean(one) - statistics.fmean(other):+.1f} +- {error:.1f}"


def main(paths: list[str]) -> None:
    """Compare the two runs named on the command line."""
    if len(paths) != 2:
        raise SystemExit(__doc__)
    runs = [read_metrics(Path(path) / "metrics.csv") for path in paths]
    shared = min(metrics["env_steps"][-1] for metrics in runs)
    print("Mean return of training batches after one gradient step (their number)")
    names = "  ".join(f"{Path(path).name:>28}" for path in paths)
    print(f"{'million control steps':>22}  {names}  {'difference':>16}")
    for part in range(ROWS):
        low, high = shared * part / ROWS, shared * (part + 1) / ROWS
        one, other = (between(metrics, low, high) for metrics in runs)
        cells = f"{mean(one):>28}  {mean(other):>28}  {difference(one, other):>16}"
        print(f"{high / 1e6:22.1f}  {cells}")
    for path, metrics in zip(paths, runs, strict=True):
        steps, after = metrics["env_steps"], metrics["return_1"]
        print(
            f"{path}: {len(steps)} iterations, {steps[-1] / 1e6:.1f} million control "
            f"steps; {mean(after[-10:])} after one step at the end"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
