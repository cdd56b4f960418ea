"""Print how much of the inner gradient tells tasks apart, before anything is learned.

python experiments/results/inner_signal.py EXPERIMENT [--SETTING VALUE ...]

For each seed of the initial policy and some discounts and lambdas: the part of the squared inner
gradient that belongs to the task, and that as a share of the whole. A part belongs to the task if
it is there again in other episodes of the same task, and not in those of the others; the rest is
noise, or the same for all tasks. One gradient step gains in proportion to the first, and moves the
policy in proportion to the second.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.func import grad, vmap

from envs import TaskFamily
from maml_rl.adapt import Params, broadcast, flatten
from maml_rl.chunks import of_tasks
from maml_rl.config import Experiment, experiment_from, find_experiment
from maml_rl.episodes import Episodes, Steps, pack
from maml_rl.maml import estimate_in_chunks
from maml_rl.plain_yaml import read_yaml
from maml_rl.policy import GaussianPolicy
from maml_rl.settings import flag_values
from maml_rl.shard import chunks_for, collector, make_sampler
from maml_rl.trained import new_policy

SEEDS = (0, 1, 2)
TASKS = 20
VARIANTS = ((0.99, 1.0), (0.95, 1.0), (0.9, 1.0), (0.99, 0.9), (0.99, 0.8), (0.95, 0.9))
"""Discount and lambda."""


def inner_gradients(
    experiment: Experiment[TaskFamily], policy: GaussianPolicy, theta: Params, steps: Steps
) -> Tensor:
    """Return each task's inner gradient at theta, (M, d) float64."""
    loss = experiment.adaptation.inner_step(policy).loss

    def task_loss(params: Params, task: Steps) -> Tensor:
        return loss(policy.log_prob(params, task.observations, task.actions), task)

    tasks = len(steps.weights)
    params = broadcast(theta, tasks)
    rows = [
        vmap(grad(task_loss))(of_tasks(params, i, i + 4), steps.of_tasks(i, i + 4))
        for i in range(0, tasks, 4)
    ]
    return torch.cat([flatten(row, axes=1).double() for row in rows])


def parts(one: Tensor, other: Tensor) -> tuple[float, float]:
    """Return the squared length that belongs to the task, and the whole.

    Args:
        one: gradients (M, d) of M tasks.
        other: of the same tasks, from other episodes.
    """
    products = one @ other.T
    same = products.diagonal().mean()
    different = (products.sum() - products.diagonal().sum()) / (len(one) * (len(one) - 1))
    whole = (one.square().sum(1).mean() + other.square().sum(1).mean()) / 2
    return float(same - different), float(whole)


def batches(experiment: Experiment[TaskFamily]) -> tuple[GaussianPolicy, Params, list[Episodes]]:
    """Return a new policy, theta, and two batches of the same tasks."""
    fresh = new_policy(experiment)
    sampler = make_sampler(experiment, fresh.policy, TASKS)
    try:
        collect = collector(experiment, sampler, 0, 0, TASKS)
        params = broadcast(fresh.params, TASKS)
        return fresh.policy, fresh.params, [collect(params, phase) for phase in (0, 1)]
    finally:
        sampler.close()


def rows(experiment: Experiment[TaskFamily]) -> Iterator[str]:
    """Yield a line for each discount and lambda."""
    policy, theta, sampled = batches(experiment)
    with chunks_for(experiment, policy, TASKS) as chunks:
        for discount, gae_lambda in VARIANTS:
            settings = replace(experiment.advantages, discount=discount, gae_lambda=gae_lambda)
            gradients = []
            for episodes in sampled:
                advantages, _ = estimate_in_chunks(episodes, settings, chunks)
                steps = pack(episodes, advantages)
                gradients.append(inner_gradients(experiment, policy, theta, steps))
            task, whole = parts(*gradients)
            yield (
                f"{experiment.seed:4d} {discount:9.2f} {gae_lambda:7.2f} {task:8.4f} "
                f"{whole:8.4f} {task / whole:8.1%}"
            )


def main(words: Sequence[str]) -> None:
    """Print the table of one experiment."""
    if not words:
        sys.exit(__doc__)
    file = find_experiment(words[0])
    changed = dict(flag_values(list(words[1:])))
    print("seed  discount  lambda     task    whole    share")
    for seed in SEEDS:
        more = {"seed": seed, "sampling.tasks": TASKS, **changed}
        for row in rows(experiment_from(read_yaml(file), str(file), **more)):
            print(row, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
