"""Print whether a trust-region step is worth anything on episodes that it was not computed from.

python experiments/results/outer_signal.py RUN [BATCHES]

From a run's newest policy: the slope of the surrogate along each batch's own natural-gradient step
(of the length that `max_kl` allows), on the batch itself and on the other batches. Where the second
is 0 the policy is at a stationary point, or the batches are too small to see a slope; more
iterations of the same kind do not help.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from maml_rl.chunks import torch_threads
from maml_rl.maml import sample_and_adapt
from maml_rl.shard import chunks_for, collector, make_sampler
from maml_rl.trained import load
from maml_rl.trust_region import conjugate_gradient


def gradients_and_steps(run: Path, batches: int) -> tuple[list[Tensor], list[Tensor]]:
    """Return the surrogate's gradient on each batch, (d,), and the step that it leads to.

    Args:
        run: the run folder.
        batches: how many to sample, with tasks and episodes of their own.
    """
    trained = load(run)
    experiment = trained.experiment
    settings, tasks = experiment.trust_region, experiment.sampling.tasks
    inner = experiment.adaptation.inner_step(trained.policy)
    sampler = make_sampler(experiment, trained.policy, tasks)
    gradients, steps = [], []
    with chunks_for(experiment, trained.policy, tasks) as chunks, torch_threads(1):
        for batch in range(batches):
            # Iterations that training never reached.
            collect = collector(experiment, sampler, 1_000_000 + batch, 0, tasks)
            adapted = sample_and_adapt(
                trained.params,
                inner,
                experiment.adaptation.inner_steps,
                collect,
                tasks,
                advantages=experiment.advantages,
                chunks=chunks,
                clock=time.perf_counter,
            )
            objective = adapted.objective(inner, chunks)
            gradient = objective.gradient().double()
            step, rest, _ = conjugate_gradient(
                lambda v, o=objective: o.product(v.float()).double() + settings.damping * v,
                -gradient,
                settings.cg_iterations,
            )
            curvature = float(step.dot(-gradient - rest))
            gradients.append(gradient)
            steps.append(math.sqrt(2.0 * settings.max_kl / curvature) * step)
            print(f"batch {batch + 1} of {batches}", file=sys.stderr, flush=True)
    sampler.close()
    return gradients, steps


def main(run: Path, batches: int) -> None:
    """Print both slopes."""
    gradients, steps = gradients_and_steps(run, batches)
    slopes = torch.stack(gradients) @ torch.stack(steps).T
    own = slopes.diagonal().tolist()
    others = slopes[~torch.eye(batches, dtype=torch.bool)].tolist()
    for name, found in (("its own batch", own), ("other batches", others)):
        error = statistics.stdev(found) / math.sqrt(len(found))
        print(f"surrogate along a step, on {name}: {statistics.fmean(found):+.4f} +- {error:.4f}")


if __name__ == "__main__":
    if not 2 <= len(sys.argv) <= 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 6)
