"""Pictures of runs; needs the extra `plot`.

python -m maml_rl.figures RUN --out learning_curve.png
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from maml_rl.errors import InputError
from maml_rl.runs import RunFolder, read_metrics
from maml_rl.settings import parse_with_tyro

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
"""Okabe and Ito's, told apart by the colour-blind; line styles tell them apart without colour."""
STYLES = ("--", "-", "-.", ":")


@dataclass(frozen=True, kw_only=True)
class FigureOptions:
    """What to draw."""

    run: tyro.conf.Positional[Path]
    """The run folder."""
    out: Path = Path("learning_curve.png")
    """The picture; PNG or SVG by its name."""


def learning_curve(run: Path, out: Path) -> None:
    """Draw return before and after each inner step against iterations and env steps.

    Raises:
        InputError: if matplotlib is not installed, or the run has no metrics.
    """
    try:
        import matplotlib
    except ImportError as missing:
        raise InputError("figures need matplotlib: pip install 'maml-rl[plot]'") from missing
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder = RunFolder.open(run)
    if not folder.metrics.exists():
        raise InputError(f"{run} has no metrics.csv yet")
    metrics = read_metrics(folder.metrics)
    phases = sum(1 for n in metrics if n.startswith("return_") and not n.endswith("_sd"))
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    million = [s / 1e6 for s in metrics["env_steps"]]
    for k in range(phases):
        mean, spread = metrics[f"return_{k}"], metrics[f"return_{k}_sd"]
        label = "before adapting" if k == 0 else f"after {k} gradient step{'s' * (k > 1)}"
        colour = COLOURS[k % len(COLOURS)]
        axes.plot(million, mean, STYLES[k % len(STYLES)], color=colour, label=label)
        low = [m - s for m, s in zip(mean, spread, strict=True)]
        high = [m + s for m, s in zip(mean, spread, strict=True)]
        axes.fill_between(million, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.set_xlabel("control steps sampled (millions)")
    axes.set_ylabel("return of an episode")
    axes.set_title(f"{run.name}: mean and spread over training tasks")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150)
    plt.close(figure)


def main() -> None:
    """Draw from the command line."""
    try:
        options = parse_with_tyro(FigureOptions, sys.argv[1:], "python -m maml_rl.figures")
        learning_curve(options.run, options.out)
    except InputError as error:
        print(f"maml-rl: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
