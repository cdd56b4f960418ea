"""A network to hold in the hand: adapt it to a few examples, then ask it."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.func import vmap

from maml_rl.adapt import Params, broadcast
from maml_rl.checkpoints import Checkpoint
from maml_rl.devices import Device, check_place, device_for
from maml_rl.errors import InputError, RunWarning
from maml_rl.plain_yaml import parse_yaml
from maml_rl.runs import RunFolder
from maml_rl.supervised.config import (
    SupervisedExperiment,
    as_tree,
    experiment_from,
    load_experiment,
    made_for,
    network_of,
)
from maml_rl.supervised.learner import Learner
from maml_rl.supervised.networks import Network, OwnNetwork
from maml_rl.supervised.own import OwnSource, OwnTasks, TaskSampler, as_examples
from maml_rl.supervised.tasks import Batch, Examples, Problem, TaskSource, floats, silent
from maml_rl.trained import describe, differing, from_config, to_device
from maml_rl.versions import differences

NO_MATTER = re.compile(r"iterations|threads|device|record_every|data\.root|data\.cache")
"""Settings that a run may be resumed with others of."""
MATTERS = ("torch", "numpy", "maml-rl")
"""Packages that a supervised run's numbers depend on."""


def measure_name(problem: Problem) -> str:
    """Return what a problem's tasks are scored by: accuracy, or the mean squared error."""
    return "accuracy" if problem.classifies else "error"


@dataclass(frozen=True)
class AdaptedNetwork:
    """A network after gradient steps on one task's examples."""

    learner: Learner
    params: Params
    """(...), of this task alone."""
    support: Examples
    """(1, S, ...): what it was adapted to."""

    def __call__(self, inputs: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Return outputs (Q, Y) for inputs (Q, ...): values, or a score for each class.

        Batch normalisation goes by the statistics that the network was trained with: those of
        these inputs, or where `transductive` is False of what it was adapted to.

        Raises:
            ValueError: for inputs of another shape than those adapted to.
        """
        given, shape = floats(inputs), self.support.inputs.shape[2:]
        if given.shape[1:] != shape:
            raise ValueError(f"inputs must be (Q, {', '.join(map(str, shape))}), got {given.shape}")
        query = Examples(given[None].to(self.support.inputs.device), self.support.targets)
        params = {name: p[None] for name, p in self.params.items()}
        transductive = self.learner.settings.transductive
        with torch.no_grad():
            batch = Batch(self.support, query)
            outputs = self.learner.predict(params, batch, transductive=transductive)
        result: npt.NDArray[np.float32] = outputs[0].cpu().numpy()
        return result


@dataclass(frozen=True)
class LearnedNetwork:
    """Meta-parameters with all that is needed to adapt them. Immutable."""

    experiment: SupervisedExperiment[Problem]
    learner: Learner
    source: TaskSource
    meta: Params
    """Parameters of the network, and learned step sizes where there are any."""

    def adapt(
        self, inputs: npt.ArrayLike, targets: npt.ArrayLike, *, steps: int | None = None
    ) -> AdaptedNetwork:
        """Return the network after gradient steps on examples of one task.

        Args:
            inputs: (S, ...).
            targets: (S,) numbers of classes, or (S, Y) values.
            steps: gradient steps; by default as many as in training.

        Raises:
            ValueError: for negative steps, or what is no input or target of the problem.
        """
        inner = self.experiment.adaptation.inner_steps
        count = inner if steps is None else steps
        if count < 0:
            raise ValueError(f"steps must be at least 0, got {count}")
        given = as_examples(inputs, targets, classifies=self.learner.classifies)
        problem = self.experiment.data
        if len(given.inputs) != len(given.targets):
            raise ValueError(
                f"{len(given.inputs)} inputs and {len(given.targets)} targets were given"
            )
        if given.inputs.shape[1:] != problem.input_shape:
            raise ValueError(
                f"an input must be of shape {problem.input_shape}, got "
                f"{tuple(given.inputs.shape[1:])}"
            )
        wrong = outside(given.targets, problem)
        if wrong:
            raise ValueError(wrong)
        one = Examples(given.inputs[None], given.targets[None]).to(self.experiment.device)
        learner = self.learner
        if learner.classifies:
            # Of each class as many as there are on average.
            learner = replace(learner, shots=max(1, len(given.targets) // problem.outputs))
        *_, params = learner.along(self.meta, one, count)
        own = {name: p[0].detach().clone() for name, p in params.items()}
        return AdaptedNetwork(learner, own, one)


def outside(targets: Tensor, problem: Problem) -> str:
    """Return what is wrong with targets (..., S) or (..., S, Y) of a problem, "" if nothing is."""
    if problem.classifies:
        low, high = int(targets.min()), int(targets.max())
        if low < 0 or high >= problem.outputs:
            return f"classes must be from 0 to {problem.outputs - 1}, got {low} to {high}"
    elif targets.shape[-1] != problem.outputs:
        return f"a target must be {problem.outputs} numbers, got {targets.shape[-1]}"
    return ""


def new_network(
    experiment: SupervisedExperiment[Problem],
    *,
    network: nn.Module | None = None,
    tasks: TaskSampler | None = None,
    say: Callable[[str], None] = silent,
) -> LearnedNetwork:
    """Return an experiment's untrained network, and open its data.

    Args:
        experiment: all settings.
        network: a module of your own (S, ...) -> (S, Y), in place of the experiment's network.
        tasks: a function of your own that draws tasks, in place of the experiment's data.
        say: is told what takes time.

    Raises:
        InputError: if the device or the data are not there, or network and data do not fit.
    """
    check_place(experiment.device)
    problem, settings = experiment.data, experiment.adaptation
    source: TaskSource = (
        problem.open(say) if tasks is None else OwnSource(tasks, classifies=problem.classifies)
    )
    made: Network = network_of(experiment) if network is None else own_network(network)
    if made.normalises and network is not None and not settings.transductive:
        raise InputError(
            "adaptation.transductive False needs a network of this package: a module of your own "
            "normalises by what goes through it"
        )
    learner = Learner(made, settings, problem.classifies, problem.shots)
    meta = to_device(learner.initial_parameters(experiment.seed), experiment.device)
    check_outputs(learner, meta, problem)
    return LearnedNetwork(experiment, learner, source, meta)


def own_network(module: nn.Module) -> OwnNetwork:
    """Wrap a module of the user's own.

    Raises:
        InputError: if it cannot be learned.
    """
    try:
        return OwnNetwork(module)
    except ValueError as error:
        raise InputError(str(error)) from error


def check_outputs(learner: Learner, meta: Params, problem: Problem) -> None:
    """Raise InputError unless the network makes of inputs what the problem wants."""
    theta = broadcast(learner.theta(meta), 2)
    try:
        with torch.no_grad():
            inputs = torch.zeros(
                2, 3, *problem.input_shape, device=next(iter(meta.values())).device
            )
            shape = tuple(vmap(learner.network)(theta, inputs).shape[1:])
    except RuntimeError as error:
        what = str(error).splitlines()[0]
        raise InputError(
            f"the network cannot map several tasks' inputs, each 3 of shape "
            f"{problem.input_shape}: {what}"
        ) from error
    if shape != (3, problem.outputs):
        raise InputError(
            f"the network must map 3 inputs to (3, {problem.outputs}) outputs, it gave {shape}"
        )


def load(
    run: str | Path,
    *,
    checkpoint: str = "latest",
    root: str | None = None,
    device: Device | None = None,
    network: nn.Module | None = None,
    tasks: TaskSampler | None = None,
) -> LearnedNetwork:
    """Load a run's network.

    Args:
        run: the run folder.
        checkpoint: "latest", "previous" or "best" (by its score on validation tasks).
        root: where its images are now, if not where they were.
        device: where to use it; by default where it was trained, or on the CPU, with a RunWarning,
            where that is not here.
        network: the module of your own that it was trained with.
        tasks: the function of your own that draws its tasks.

    Raises:
        InputError: if the folder is no supervised run, its checkpoint is missing, damaged or made
            for something else, or its data are not there.
    """
    folder = RunFolder.open(Path(run))
    experiment = placed(experiment_of(folder, root), device)
    return restore(folder, experiment, checkpoint, network=network, tasks=tasks)[0]


def experiment_of(folder: RunFolder, root: str | None = None) -> SupervisedExperiment[Problem]:
    """Return a run's experiment, with its images elsewhere if told so.

    Raises:
        InputError: if its config.yaml is damaged, or there are no images in it.
    """
    experiment = from_config(folder, load_experiment)
    if root is None:
        return experiment
    if not hasattr(experiment.data, "root"):
        raise InputError(
            f"{folder.path} learns {experiment.data.name}, which has no images to find"
        )
    return replace(experiment, data=replace(experiment.data, **{"root": root}))


def placed(
    experiment: SupervisedExperiment[Problem], device: Device | None = None
) -> SupervisedExperiment[Problem]:
    """Return an experiment as it is used here, to test its network; see `device_for`."""
    return replace(experiment, device=device_for(experiment.device, device))


def restore(
    folder: RunFolder,
    experiment: SupervisedExperiment[Problem],
    which: str = "latest",
    *,
    network: nn.Module | None = None,
    tasks: TaskSampler | None = None,
    say: Callable[[str], None] = silent,
) -> tuple[LearnedNetwork, Checkpoint]:
    """Return the network of a run's checkpoint, and the checkpoint, for the run's own experiment.

    Raises:
        InputError: if it is missing, damaged or made for something else.
    """
    found = folder.load(which)
    fresh = new_network(experiment, network=network, tasks=tasks, say=say)
    meta = parameters_for(found, fresh)
    if changed := changes(found, experiment):
        warnings.warn(
            f"{folder.config} has changed since checkpoint {found.path.name} was made: {changed}",
            RunWarning,
            stacklevel=3,
        )
    return replace(fresh, meta=meta), found


def changes(found: Checkpoint, experiment: SupervisedExperiment[Problem]) -> str:
    """Return the settings that a checkpoint was not made with, "" if none; a total may grow."""
    try:
        before = made_with(found)
    except InputError as error:
        return str(error)
    return differing(as_tree(before), as_tree(experiment), NO_MATTER)


def made_with(found: Checkpoint) -> SupervisedExperiment[Problem]:
    """Return the experiment that a checkpoint was made by.

    Raises:
        InputError: if its settings are none that are known here.
    """
    source = str(found.path)
    return experiment_from(parse_yaml(found.origin.config, source), source)


def parameters_for(found: Checkpoint, fresh: LearnedNetwork) -> Params:
    """Return a checkpoint's parameters for use in place of a fresh network's.

    Raises:
        InputError: with both descriptions side by side, if problem or shapes differ.
    """
    theirs = describe(found.origin.made_for, found.theta)
    ours = describe(made_for(fresh.experiment.data), fresh.meta)
    if theirs != ours:
        own = OwnTasks.name in (found.origin.made_for.get("problem"), fresh.experiment.data.name)
        hint = "\n(a network of your own wants network=)" if own else ""
        raise InputError(
            f"checkpoint {found.path} is of another problem or network\n"
            f"  checkpoint: {theirs}\n  expected:   {ours}" + hint
        )
    matters = {n: v for n, v in found.origin.versions.items() if n in MATTERS}
    if changed := differences(matters):
        warnings.warn(
            f"checkpoint {found.path} was made with {', '.join(changed)}; it is used all the same, "
            "but results may differ in their last digits",
            RunWarning,
            stacklevel=3,
        )
    return to_device(found.theta, fresh.experiment.device)
