"""Print the returns of two training runs side by side, at equal numbers of control steps.

    python experiments/results/compare_curves.py RUN OTHER

A row is a tenth of the control steps that both have taken, with the mean return of the batches in
it before and after adaptation.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

ROWS = 10


def read(run: Path) -> list[dict[str, float]]:
    """Return the numbers of a run's metrics.csv, row by row."""
    names = ("env_steps", "return_0", "return_1")
    with (run / "metrics.csv").open(newline="", encoding="utf-8") as file:
        return [{name: float(row[name]) for name in names} for row in csv.DictReader(file)]


def mean(rows: list[dict[str, float]], name: str, low: float, high: float) -> str:
    """Return the mean of a column over the rows between two numbers of control steps."""
    values = [row[name] for row in rows if low < row["env_steps"] <= high]
    return f"{sum(values) / len(values):.1f} ({len(values)})" if values else "-"


def main(paths: list[str]) -> None:
    """Compare the two runs named on the command line."""
    if len(paths) != 2:
        raise SystemExit(__doc__)
    runs = [read(Path(path)) for path in paths]
    shared = min(rows[-1]["env_steps"] for rows in runs)
    print("Mean return of training batches (their number), before -> after one gradient step")
    print(f"{'million control steps':>22}  " + "  ".join(f"{Path(p).name:>34}" for p in paths))
    for part in range(ROWS):
        low, high = shared * part / ROWS, shared * (part + 1) / ROWS
        cells = [
            f"{mean(rows, 'return_0', low, high)} -> {mean(rows, 'return_1', low, high)}"
            for rows in runs
        ]
        print(f"{high / 1e6:22.1f}  " + "  ".join(f"{cell:>34}" for cell in cells))
    for path, rows in zip(paths, runs, strict=True):
        last = rows[-10:]
        after = sum(row["return_1"] for row in last) / len(last)
        print(
            f"{path}: {len(rows)} iterations, {rows[-1]['env_steps'] / 1e6:.1f} million control "
            f"steps; {after:.1f} after one step in the last {len(last)}"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
