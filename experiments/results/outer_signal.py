"""Print whether a trust-region step is worth anything on episodes that it was not computed from.

python experiments/results/outer_signal.py RUN [BATCHES]

From a run's newest policy, for the run's own settings (without momentum, and with Fisher products
of all tasks) and for some others: the slope of the surrogate along each batch's own
natural-gradient step (of the length that `max_kl` allows), on the batch itself and on the other
batches, whose surrogates have the run's own lambda. Where the second is 0 the policy is at a
stationary point, or the batches are too small to see a slope; more iterations of the same kind do
not help. Where it is small beside the first most of a step is noise.

Then what momentum makes of it: the slope on each batch along the step of one batch before it, and
along the sum of all batches' natural gradients before it, both of the length that the batch's own
metric allows.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
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
    metric_share: float = 1.0


def variants(experiment: Experiment[TaskFamily]) -> list[Variant]:
    """Return the run's own way first, then with one thing changed."""
    settings = experiment.trust_region
    own = Variant(experiment.advantages.gae_lambda, settings.damping, settings.cg_iterations)
    others = [
        own._replace(damping=0.1),
        *(own._replace(cg_iterations=value) for value in (1, 4)),
        *(own._replace(gae_lambda=value) for value in (1.0, 0.9)),
        *(own._replace(metric_share=value) for value in (0.5, 0.25)),
    ]
    return list(dict.fromkeys([own, *others]))


def adapted_batches(run: Path, batches: int) -> Iterator[tuple[Adapted, InnerStep, Chunks]]:
    """Yield batches of tasks adapted to, with tasks and episodes of their own."""
    trained = load(run)
    experiment = trained.experiment
    tasks = experiment.sampling.tasks
    inner = trained.adaptation.inner_step(trained.policy)
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


class Signal(NamedTuple):
    """What B batches say of each other's steps."""

    gradients: Tensor
    """(B, d) float64: of the surrogate on each batch."""
    steps: Mapping[Variant, Tensor]
    """(B, d) float64 each: the steps computed from each batch."""
    natural: Tensor
    """(B, d) float64: natural gradients by the run's own settings, the steps before their length
    was found."""
    one: list[float]
    """Slopes on each batch but the first along one earlier batch's step: means over those."""
    summed: list[float]
    """Slopes on each batch but the first along all earlier batches' natural gradients."""


def slope_along(
    objective: MetaObjective, gradient: Tensor, max_kl: float, direction: Tensor
) -> float:
    """Return the surrogate's slope along a direction (d,), as far as `max_kl` allows here."""
    squared = float(direction @ objective.product(direction.float()).double())
    return math.sqrt(2.0 * max_kl / squared) * float(gradient @ direction)


def measure(run: Path, batches: int) -> Signal:
    """Sample batches, and find the steps of each and their slopes."""
    experiment = load(run).experiment
    wanted = variants(experiment)
    gradients: list[Tensor] = []
    natural: list[Tensor] = []
    steps: dict[Variant, list[Tensor]] = {variant: [] for variant in wanted}
    one: list[float] = []
    summed: list[float] = []
    for adapted, inner, chunks in adapted_batches(run, batches):
        # By what an objective is made of; one at a time, since each keeps its graphs.
        objectives: dict[tuple[float, float], tuple[MetaObjective, Tensor]] = {}
        for variant in wanted:
            made_of = (variant.gae_lambda, variant.metric_share)
            if made_of not in objectives:
                settings = replace(experiment.advantages, gae_lambda=variant.gae_lambda)
                estimated, _ = estimate_in_chunks(adapted.episodes[-1], settings, chunks)
                outer = pack(adapted.episodes[-1], estimated)
                objective = replace(adapted, batches=(*adapted.batches[:-1], outer)).objective(
                    inner, chunks, metric_share=variant.metric_share
                )
                objectives = {made_of: (objective, objective.gradient().double())}
            objective, gradient = objectives[made_of]
            way = replace(
                experiment.trust_region,
                metric_share=variant.metric_share,
                damping=variant.damping,
                cg_iterations=variant.cg_iterations,
                momentum=0.0,
            )
            full = full_step(objective, gradient, way, torch.float32)
            if full.complaint is not None:
                sys.exit(f"no step can be found: {full.complaint}")
            steps[variant].append(full.step)
            if variant is not wanted[0]:
                continue
            if natural:
                slope = partial(slope_along, objective, gradient, experiment.trust_region.max_kl)
                one.append(statistics.fmean(map(slope, natural)))
                summed.append(slope(torch.stack(natural).sum(0)))
            gradients.append(gradient)
            natural.append(full.followed)
    return Signal(
        torch.stack(gradients),
        {name: torch.stack(found) for name, found in steps.items()},
        torch.stack(natural),
        one,
        summed,
    )


def with_error(values: list[float]) -> str:
    """Return a mean with its standard error."""
    # Of one value there is none.
    error = statistics.stdev(values) / math.sqrt(len(values)) if values[1:] else math.nan
    return f"{statistics.fmean(values):+.4f} +- {error:.4f}"


def main(run: Path, batches: int) -> None:
    """Print the slopes."""
    signal = measure(run, batches)
    print("lambda  damping  products  share  on its own batch   on other batches")
    for variant, found in signal.steps.items():
        slopes = signal.gradients @ found.T
        own = slopes.diagonal()
        # A step's slopes on the others are one reading: they share its noise.
        others = (slopes.sum(0) - own) / (batches - 1)
        print(
            f"{variant.gae_lambda:6.2f} {variant.damping:8g} {variant.cg_iterations:9d} "
            f"{variant.metric_share:6.2f}  "
            f"{with_error(own.tolist())}  {with_error(others.tolist())}"
        )
    print(f"\nalong one earlier batch's step: {with_error(signal.one)}")
    print(f"along the sum of all earlier batches' natural gradients: {with_error(signal.summed)}")


if __name__ == "__main__":
    if not 2 <= len(sys.argv) <= 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 6)
