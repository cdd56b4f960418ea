"""Draw the paper's figure 5 again, ours beside the paper's: figure_5.png and figure_5.svg here.

python experiments/results/make_figures.py

From the tables of the benchmarks that are kept here; a family without one is left out. Figure 4 is
benchmark_navigation/returns.png and trajectories.png, which `maml-rl benchmark` draws.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl

from maml_rl.config import load_experiment
from maml_rl.figures import LOOK, panels_figure, write_figures
from maml_rl.stored import has_results, read_outcomes

RESULTS = Path(__file__).parent
FAMILIES = ("half_cheetah_vel", "half_cheetah_dir", "ant_vel", "ant_dir")


def main() -> None:
    """Draw it."""
    benchmarks = []
    for name in FAMILIES:
        folder = RESULTS / f"benchmark_{name}"
        if has_results(folder):
            family = load_experiment(name).family
            benchmarks.append((family, read_outcomes(folder, family)))
    with mpl.rc_context(LOOK):
        write_figures(RESULTS, {"figure_5": panels_figure(benchmarks)})


if __name__ == "__main__":
    main()
