"""A policy to hold in the hand: adapt it to a task, then act in any loop."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from envs.family import TaskFamily
from maml_rl.adapt import Params
from maml_rl.checkpoints import CONFIG, Checkpoint
from maml_rl.chunks import Chunks
from maml_rl.config import (
    Experiment,
    as_tree,
    experiment_from,
    load_experiment,
    made_for,
    observation_size,
)
from maml_rl.devices import (
    Device,
    Physics,
    check_place,
    device_for,
    physics_for,
    reproducible,
)
from maml_rl.errors import InputError, RunWarning
from maml_rl.evaluate import adapt_to_tasks, step_sizes
from maml_rl.maml import AdaptationSettings
from maml_rl.memory import check_policy_memory
from maml_rl.plain_yaml import leaves, parse_yaml
from maml_rl.policy import LOG_STD, GaussianPolicy, log_std, make_policy
from maml_rl.runs import RunFolder
from maml_rl.sampler import Sampler
from maml_rl.seeds import TRAINING
from maml_rl.versions import differences

E = TypeVar("E")

ROUND_ONLY = {"torch", "numpy"}
"""Packages of whose releases only last digits depend; nobody is told of them unasked."""


@dataclass(frozen=True)
class TrainedPolicy:
    """Parameters with all that is needed to adapt and to act. Immutable: `adapt` makes another."""

    experiment: Experiment[TaskFamily]
    policy: GaussianPolicy
    params: Params
    """theta, or theta' of one task."""
    task: npt.NDArray[np.float32] | None = None
    """(P,): the task that it was adapted to."""
    iteration: int = 0
    """Iterations that theta was trained for, which say what its alpha is."""
    _rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0), repr=False)

    @property
    def adaptation(self) -> AdaptationSettings:
        """How it adapts: the experiment's settings as they are in its iteration."""
        return self.experiment.adaptation.at(self.iteration, self.params)

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

        The step size is the policy's alpha, and less after the first updates, as in evaluation.

        Args:
            family: whose task it is; its observations and actions must be those trained on.
            task: (P,).
            steps: gradient steps.
            episodes: episodes for each step, or more where `evaluation.count` is steps and they end
                early; by default the experiment's.
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
        if episodes is not None and episodes < 1:
            raise ValueError(f"episodes must be at least 1, got {episodes}")
        experiment = self.experiment
        settings = replace(experiment.evaluation, steps=steps)
        params = self.params
        with (
            reproducible(params[LOG_STD].device.type),
            Chunks(experiment.threads) as chunks,
            Sampler(
                family,
                self.policy,
                tasks=1,
                episodes=settings.episodes if episodes is None else episodes,
                count=settings.count,
                action_scale=experiment.policy.action_scale,
                threads=experiment.threads,
                device=params[LOG_STD].device.type,
                physics=experiment.physics,
                warp=experiment.warp,
            ) as sampler,
        ):
            for adapted, _ in adapt_to_tasks(
                self.policy,
                self.params,
                sampler,
                family.check_task(task)[None],
                adaptation=self.adaptation,
                advantages=experiment.advantages,
                sizes=step_sizes(self.adaptation, settings),
                stream=TRAINING,
                seed=seed,
                chunks=chunks,
                last=False,
            ):
                params = {name: p[0].clone() for name, p in adapted.items()}
        return replace(
            self,
            # Further steps have the alpha of theta, whatever this one did to the noise.
            experiment=replace(experiment, adaptation=self.adaptation),
            params=params,
            task=family.check_task(task),
            _rng=np.random.default_rng(seed),
        )

    def act(
        self, observation: npt.ArrayLike, *, deterministic: bool = False
    ) -> npt.NDArray[np.float32]:
        """Return an action for one observation (O,) or several (N, O), in the body's own unit.

        Clipped to the body's bounds. Stochastic unless `deterministic`, as in training.

        Raises:
            ValueError: if the policy observes the task and was not adapted to one.
        """
        rows = torch.as_tensor(np.asarray(observation, np.float32))
        if self.policy.observes_task:
            if self.task is None:
                raise ValueError(
                    "this policy observes its task; adapt it first, by 0 steps or more"
                )
            told = torch.from_numpy(self.task).expand(*rows.shape[:-1], -1)
            rows = torch.cat([rows, told], -1)
        device = self.params[LOG_STD].device
        with torch.no_grad():
            batch = rows.reshape(-1, rows.shape[-1]).to(device)
            mean = self.policy.network(self.params, batch).cpu().numpy()
            std = np.exp(log_std(self.params).cpu().numpy())
        noise = 0.0 if deterministic else self._rng.standard_normal(mean.shape, dtype=np.float32)
        low, high = self.experiment.family.action_bounds
        scale = self.experiment.policy.action_scale
        wanted = (low + high) / 2.0 + (high - low) / 2.0 * (mean + std * noise) / scale
        action: npt.NDArray[np.float32] = np.clip(wanted, low, high).astype(np.float32)
        return action if rows.ndim > 1 else action[0]


def new_policy(experiment: Experiment[TaskFamily], mean: nn.Module | None = None) -> TrainedPolicy:
    """Return the untrained policy of an experiment, its mean an MLP or your own module.

    Raises:
        InputError: if the experiment's device or physics is not there, the policy is larger than
            memory, or the module's output has not one number an action.
    """
    check_place(experiment.device, experiment.physics)
    check_policy_memory(experiment)
    family = experiment.family
    inputs, outputs = observation_size(experiment), len(family.action_columns)
    # A copy: `to` would move the caller's own.
    module = None if mean is None else copy.deepcopy(mean).to(experiment.device)
    policy = make_policy(experiment.policy, inputs, outputs, module)
    theta = to_device(policy.initial_parameters(experiment.seed), experiment.device)
    with torch.no_grad():
        shape = policy.network(theta, torch.zeros(3, inputs, device=experiment.device)).shape
    if shape != (3, outputs):
        raise InputError(
            f"the policy's mean must map (3, {inputs}) observations to (3, {outputs}) actions, "
            f"it gave {tuple(shape)}"
        )
    return TrainedPolicy(experiment, policy, theta)


def to_device(params: Params, device: str) -> Params:
    """Return parameters on a device."""
    return {name: p.to(device) for name, p in params.items()}


def load(
    run: str | Path,
    *,
    checkpoint: str = "latest",
    mean: nn.Module | None = None,
    device: Device | None = None,
    physics: Physics | None = None,
) -> TrainedPolicy:
    """Load a run's policy.

    Args:
        run: the run folder.
        checkpoint: "latest", "previous" or "best" (by training return after adaptation). Where
            "latest" is damaged the one before is loaded, with a RunWarning.
        mean: the module that it was trained with, where that was not the MLP.
        device: where to use it; by default where it was trained, or on the CPU, with a RunWarning,
            where that is not here.
        physics: what to simulate with; by default likewise.

    Raises:
        InputError: if the folder is no run, its checkpoint is missing or damaged, or was made
            for another family, protocol or size of policy, or device or physics is not here.
    """
    folder = RunFolder.open(Path(run))
    experiment = placed(experiment_of(folder), device, physics)
    return restore(folder, experiment, checkpoint, mean)[0]


def placed(
    experiment: Experiment[TaskFamily], device: Device | None = None, physics: Physics | None = None
) -> Experiment[TaskFamily]:
    """Return an experiment as it is used here, to test or to show its policy.

    Raises:
        InputError: if device or physics is given and not here.

    Warns:
        RunWarning: if one is not given, and the experiment's own is not here.
    """
    there = device_for(experiment.device, device)
    return replace(experiment, device=there, physics=physics_for(experiment.physics, physics))


def experiment_of(folder: RunFolder) -> Experiment[TaskFamily]:
    """Return a run's experiment, as its config.yaml says.

    Raises:
        InputError: if that is damaged, naming where copies are.
    """
    return from_config(folder, load_experiment)


def from_config(folder: RunFolder, load: Callable[[Path], E]) -> E:
    """Return what a run's config.yaml is loaded as.

    Raises:
        InputError: if that is damaged, naming where copies are.
    """
    try:
        return load(folder.config)
    except InputError as error:
        copies = folder.checkpoints.path / "latest" / CONFIG
        hint = f". {copies} is what it was" if copies.is_file() else ""
        raise InputError(f"{error}{hint}") from error


def restore(
    folder: RunFolder,
    experiment: Experiment[TaskFamily],
    which: str = "latest",
    mean: nn.Module | None = None,
) -> tuple[TrainedPolicy, Checkpoint]:
    """Return the policy of a run's checkpoint, and the checkpoint, for the run's own experiment.

    Raises:
        InputError: if it is missing, damaged or made for something else.
    """
    found = folder.load(which)
    fresh = new_policy(experiment, mean)
    theta = parameters_for(found, fresh)
    if changed := changes(found, experiment):
        warnings.warn(
            f"{folder.config} has changed since checkpoint {found.path.name} was made: {changed}",
            RunWarning,
            stacklevel=3,
        )
    return replace(fresh, params=theta, iteration=found.state.iteration), found


def parameters_for(found: Checkpoint, fresh: TrainedPolicy) -> Params:
    """Return a checkpoint's parameters for use in place of a fresh policy's.

    Raises:
        InputError: with both descriptions side by side, if family, protocol or shapes differ.
    """
    theirs = describe(found.origin.made_for, found.theta)
    ours = describe(made_for(fresh.experiment.family), fresh.params)
    if theirs != ours:
        raise InputError(
            f"checkpoint {found.path} is of another family, protocol or policy\n"
            f"  checkpoint: {theirs}\n  expected:   {ours}\n"
            "(a policy trained with a module of your own wants mean=)"
        )
    matters = {n: v for n, v in found.origin.versions.items() if n not in ROUND_ONLY}
    if changed := differences(matters):
        warnings.warn(
            f"checkpoint {found.path} was made with {', '.join(changed)}; it is used all the same, "
            "but results may differ (MuJoCo's physics changes between releases)",
            RunWarning,
            stacklevel=3,
        )
    return to_device(found.theta, fresh.experiment.device)


def describe(made_for: Mapping[str, str | int], theta: Params) -> str:
    """Return in a line what parameters are for and their shapes."""
    if "family" not in made_for:
        # A network of supervised learning.
        words = ", ".join(f"{name} {value}" for name, value in made_for.items())
        return f"{words}; {shapes_of(theta)}"
    protocol = f" ({made_for['protocol']} protocol)" if made_for["protocol"] else ""
    return (
        f"{made_for['family']}{protocol}, {made_for['observations']} observations, "
        f"{made_for['actions']} actions; {shapes_of(theta)}"
    )


def shapes_of(theta: Params) -> str:
    """Return in a line the names and shapes of parameters, and types that are not the usual one."""
    usual = torch.float32
    return ", ".join(
        f"{name} {tuple(p.shape)}{'' if p.dtype == usual else f' {p.dtype}'}"
        for name, p in theta.items()
    )


def changes(found: Checkpoint, experiment: Experiment[TaskFamily]) -> str:
    """Return the settings that a checkpoint was not made with, "" if none; a total may grow."""
    source = str(found.path)
    try:
        # Through the settings' own types, so that one that is new here has its default.
        made_with = experiment_from(parse_yaml(found.origin.config, source), source)
    except InputError as error:
        return str(error)
    return differing(as_tree(made_with), as_tree(experiment), NO_MATTER, most=5)


NO_MATTER = re.compile(r"iterations|threads|device|physics|warp\..*|evaluation\..*")
"""Settings that a run may be resumed with others of, or that training does not read."""


def differing(
    before: Mapping[str, object],
    now: Mapping[str, object],
    ignored: re.Pattern[str],
    *,
    most: int | None = None,
) -> str:
    """Return in a line the settings in which two experiments differ, "" if there are none.

    Of more than `most` the others are only counted.
    """
    old, new = dict(leaves(before)), dict(leaves(now))
    changed = [
        f"{path} {old.get(path, 'absent')} -> {new.get(path, 'absent')}"
        for path in sorted(old.keys() | new.keys())
        if not ignored.fullmatch(path) and old.get(path) != new.get(path)
    ]
    shown = changed[:most]
    more = [f"and {len(changed) - len(shown)} more"] if len(shown) < len(changed) else []
    return ", ".join(shown + more)
