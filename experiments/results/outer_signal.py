"""Print whether a trust-region step is worth anything on episodes that it was not computed from.

python experiments/results/outer_signal.py RUN [BATCHES]

From a run's newest policy, for the run's own settings (without momentum, and with Fisher products
of all tasks) and for some others: the slope of the surrogate along each batch's own
natural-gradient step (of the length that `max_kl` allows), on the batch itself and on the other
batches, whose surrogates have the run's own lambda. Where the second is 0 the policy is at a
stationary point, or the batches are too small to see a slope; more iterations of the same kind do
not help. Where it is small beside the first most of a step is noise.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from envs import TaskFamily
from maml_rl.chunks import Chunks, torch_threads
from maml_rl.config import Experiment
from maml_rl.curvature import InnerStep
from maml_rl.episodes import pack
from maml_rl.maml import Adapted, MetaObjective, estimate_in_chunks, sample_and_adapt
from maml_rl.shard import chunks_for, collector, make_sampler
from maml_rl.trained import load
from maml_rl.trust_region import full_step


class Variant(NamedTuple):
    """How a step is computed."""

    gae_lambda: float
    """Of the episodes after adaptation; inner steps keep the run's."""
    damping: float
    cg_iterations: int


def variants(experiment: Experiment[TaskFamily]) -> list[Variant]:
    """Return the run's own way first, then with one thing changed."""
    settings = experiment.trust_region
    own = Variant(experiment.advantages.gae_lambda, settings.damping, settings.cg_iterations)
    others = [
        own._replace(damping=0.1),
        *(own._replace(cg_iterations=value) for value in (1, 4)),
        *(own._replace(gae_lambda=value) for value in (1.0, 0.9)),
    ]
    return list(dict.fromkeys([own, *others]))


def adapted_batches(run: Path, batches: int) -> Iterator[tuple[Adapted, InnerStep, Chunks]]:
    """Yield batches of tasks adapted to, with tasks and episodes of their own."""
    trained = load(run)
    experiment = trained.experiment
    tasks = experiment.sampling.tasks
    inner = experiment.adaptation.inner_step(trained.policy)
    sampler = make_sampler(experiment, trained.policy, tasks)
    with chunks_for(experiment, trained.policy, tasks) as chunks, torch_threads(1):
        for batch in range(batches):
            # Iterations that training never reached.
            yield (
                sample_and_adapt(
                    trained.params,
                    inner,
                    experiment.adaptation.inner_steps,
                    collector(experiment, sampler, 1_000_000 + batch, 0, tasks),
                    tasks,
                    advantages=experiment.advantages,
                    chunks=chunks,
                    clock=time.perf_counter,
                ),
                inner,
                chunks,
            )
            print(f"batch {batch + 1} of {batches}", file=sys.stderr, flush=True)
    sampler.close()


def gradients_and_steps(run: Path, batches: int) -> tuple[Tensor, dict[Variant, Tensor]]:
    """Return the surrogate's gradient on each batch, (B, d), and the steps, each (B, d)."""
    experiment = load(run).experiment
    wanted = variants(experiment)
    gradients: list[Tensor] = []
    steps: dict[Variant, list[Tensor]] = {variant: [] for variant in wanted}
    for adapted, inner, chunks in adapted_batches(run, batches):
        objectives: dict[float, tuple[MetaObjective, Tensor]] = {}
        for variant in wanted:
            if variant.gae_lambda not in objectives:
                settings = replace(experiment.advantages, gae_lambda=variant.gae_lambda)
                estimated, _ = estimate_in_chunks(adapted.episodes[-1], settings, chunks)
                outer = pack(adapted.episodes[-1], estimated)
                # One at a time, since each keeps its graphs.
                objective = replace(adapted, batches=(*adapted.batches[:-1], outer)).objective(
                    inner, chunks
                )
                objectives = {variant.gae_lambda: (objective, objective.gradient().double())}
            objective, gradient = objectives[variant.gae_lambda]
            way = replace(
                experiment.trust_region,
                metric_share=1.0,
                damping=variant.damping,
                cg_iterations=variant.cg_iterations,
            )
            full = full_step(objective, gradient, way, torch.float32)
            if full.complaint is not None:
                sys.exit(f"no step can be found: {full.complaint}")
            steps[variant].append(full.step)
            if variant is wanted[0]:
                gradients.append(gradient)
    return torch.stack(gradients), {name: torch.stack(found) for name, found in steps.items()}


def with_error(values: list[float]) -> str:
    """Return a mean with its standard error."""
    error = statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.fmean(values):+.4f} +- {error:.4f}"


def main(run: Path, batches: int) -> None:
    """Print the slopes."""
    gradients, steps = gradients_and_steps(run, batches)
    print("lambda  damping  products  on its own batch   on other batches")
    for variant, found in steps.items():
        slopes = gradients @ found.T
        own = slopes.diagonal()
        # A step's slopes on the others are one reading: they share its noise.
        others = (slopes.sum(0) - own) / (batches - 1)
        print(
            f"{variant.gae_lambda:6.2f} {variant.damping:8g} {variant.cg_iterations:9d}  "
            f"{with_error(own.tolist())}  {with_error(others.tolist())}"
        )


if __name__ == "__main__":
    if not 2 <= len(sys.argv) <= 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 6)
