"""A policy to hold in the hand: adapt it to a task, then act in any loop."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from envs.family import TaskFamily
from maml_rl.adapt import Params
from maml_rl.config import Experiment, load_experiment
from maml_rl.evaluate import adapt_to_tasks, step_sizes
from maml_rl.maml import Chunks
from maml_rl.policy import GaussianPolicy, log_std, make_policy
from maml_rl.runs import RunFolder
from maml_rl.sampler import TRAINING, Sampler


@dataclass(frozen=True)
class TrainedPolicy:
    """Parameters with all that is needed to adapt and to act. Immutable: `adapt` makes another."""

    experiment: Experiment[TaskFamily]
    policy: GaussianPolicy
    params: Params
    """theta, or theta' of one task."""
    _rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0), repr=False)

    def adapt(
        self,
        family: TaskFamily,
        task: npt.ArrayLike,
        *,
        steps: int = 1,
        episodes: int | None = None,
        seed: int = 0,
    ) -> TrainedPolicy:
        """Return the policy after `steps` gradient steps on episodes of one task.

        The step size is the experiment's alpha, and less after the first updates, as in
        evaluation.

        Args:
            family: whose task it is; its observations and actions must be those trained on.
            task: (P,).
            steps: gradient steps.
            episodes: episodes for each step; by default the experiment's.
            seed: of the episodes.

        Raises:
            ValueError: for a task that is none of the family's, negative steps, or a family of
                other sizes.
        """
        ours, theirs = (
            (len(f.observation_columns), len(f.action_columns))
            for f in (self.experiment.family, family)
        )
        if ours != theirs:
            raise ValueError(
                f"the policy has {ours[0]} observations and {ours[1]} actions, "
                f"{family.name} has {theirs[0]} and {theirs[1]}"
            )
        if steps < 0:
            raise ValueError(f"steps must be at least 0, got {steps}")
        experiment = self.experiment
        settings = replace(experiment.evaluation, steps=steps)
        chunks = Chunks(experiment.threads)
        params = self.params
        with Sampler(
            family,
            self.policy,
            tasks=1,
            episodes=episodes or settings.episodes,
            action_scale=experiment.policy.action_scale,
            threads=experiment.threads,
        ) as sampler:
            for adapted, _ in adapt_to_tasks(
                self.policy,
                self.params,
                sampler,
                family.check_task(task)[None],
                adaptation=experiment.adaptation,
                advantages=experiment.advantages,
                sizes=step_sizes(experiment.adaptation, settings),
                stream=TRAINING,
                seed=seed,
                chunks=chunks,
                last=False,
            ):
                params = {name: p[0].clone() for name, p in adapted.items()}
        chunks.close()
        return replace(self, params=params, _rng=np.random.default_rng(seed))

    def act(
        self, observation: npt.ArrayLike, *, deterministic: bool = False
    ) -> npt.NDArray[np.float32]:
        """Return an action for one observation (O,) or several (N, O), in the body's own unit.

        Clipped to the body's bounds. Stochastic unless `deterministic`, as in training.
        """
        rows = torch.as_tensor(np.asarray(observation, np.float32))
        params = {name: p.cpu() for name, p in self.params.items()}
        with torch.no_grad():
            mean = self.policy.network(params, rows.reshape(-1, rows.shape[-1])).numpy()
            std = np.exp(log_std(params).numpy())
        noise = 0.0 if deterministic else self._rng.standard_normal(mean.shape, dtype=np.float32)
        low, high = self.experiment.family.action_bounds
        scale = self.experiment.policy.action_scale
        wanted = (low + high) / 2.0 + (high - low) / 2.0 * (mean + std * noise) / scale
        action: npt.NDArray[np.float32] = np.clip(wanted, low, high).astype(np.float32)
        return action if rows.ndim > 1 else action[0]


def new_policy(experiment: Experiment[TaskFamily], mean: nn.Module | None = None) -> TrainedPolicy:
    """Return the untrained policy of an experiment, its mean an MLP or your own module."""
    family = experiment.family
    policy = make_policy(
        experiment.policy, len(family.observation_columns), len(family.action_columns), mean
    )
    return TrainedPolicy(experiment, policy, policy.initial_parameters(experiment.seed))


def load(
    run: str | Path, *, checkpoint: str = "latest", mean: nn.Module | None = None
) -> TrainedPolicy:
    """Load a run's policy.

    Args:
        run: the run folder.
        checkpoint: "latest", "previous" or "best" (by training return after adaptation).
        mean: the module that it was trained with, where that was not the MLP.

    Raises:
        InputError: if the folder is no run, or its checkpoint is missing or damaged.
    """
    folder = RunFolder.open(Path(run))
    theta, _ = folder.load(checkpoint)
    fresh = new_policy(load_experiment(folder.config), mean)
    return replace(fresh, params=check_shapes(theta, fresh.params, folder.path))


def check_shapes(theta: Params, expected: Params, where: Path) -> Params:
    """Return theta if names and shapes are those expected.

    Raises:
        ValueError: with both descriptions side by side.
    """

    def describe(params: Params) -> dict[str, tuple[int, ...]]:
        return {name: tuple(p.shape) for name, p in params.items()}

    if describe(theta) != describe(expected):
        raise ValueError(
            f"the checkpoint in {where} holds {describe(theta)}, expected {describe(expected)}"
        )
    return theta
