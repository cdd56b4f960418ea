"""A simulation that broke down, kept so that it can be seen again.

A dump holds the episode's start and every action up to the one that broke it, which with the
experiment's settings is all that a simulator needs; and the state before that action, to look at.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from envs.family import DeviceWorlds, Floats, TaskFamily, Worlds
from maml_rl.checkpoints import UNREADABLE
from maml_rl.config import Experiment, experiment_from, to_yaml
from maml_rl.errors import InputError
from maml_rl.plain_yaml import parse_yaml
from maml_rl.rollout import Divergence
from maml_rl.versions import versions

FORMAT = 1
LARGEST = 2**28
"""Bytes of a dump beyond which it is refused unread."""


@dataclass(frozen=True)
class Dump:
    """A dump read back."""

    experiment: Experiment[TaskFamily]
    iteration: int
    divergence: Divergence
    state: Mapping[str, Floats]
    """Before the last action, as it was; see `Worlds.state`."""
    versions: Mapping[str, str]
    """What it was made with."""


@dataclass(frozen=True)
class Replay:
    """What became of a dump's episode when it was done again."""

    diverged_at: int | None
    """Control step, from 0; None if the simulation held."""
    state: Mapping[str, Floats]
    """Before the last action."""


def play(experiment: Experiment[TaskFamily], broken: Divergence) -> Replay:
    """Do an episode again with the same start and actions, by the experiment's physics."""
    family, device = experiment.family, experiment.device
    task = torch.from_numpy(broken.task).float()[None]
    actions = torch.from_numpy(broken.actions).float()
    with torch.no_grad(), ExitStack() as stack:
        if experiment.physics == "cpu":
            here = stack.enter_context(family.make_worlds(1, threads=1))
            here.reset(task, broken.start[None])
            return first_broken(here, actions)
        there = family.make_device_worlds(1, device=device, settings=experiment.warp)
        stack.callback(there.close)
        there.reset(task.to(device), torch.from_numpy(broken.start).float()[None].to(device))
        return first_broken(there, actions.to(device))


def first_broken(worlds: Worlds | DeviceWorlds, actions: Tensor) -> Replay:
    """Step one world through actions (T, A) until its simulation breaks down."""
    state: Mapping[str, Floats] = {}
    for step, action in enumerate(actions):
        state = worlds.state(0)
        if bool(worlds.step(action[None]).diverged[0]):
            return Replay(step, state)
    return Replay(None, state)


def dump_of(
    divergence: Divergence, experiment: Experiment[TaskFamily], iteration: int
) -> dict[str, object]:
    """Return a divergence and all that it depends on, ready for JSON."""
    again = play(experiment, divergence)
    return {
        "format": FORMAT,
        "iteration": iteration,
        "task_index": divergence.task_index,
        "task_seed": divergence.task_seed,
        "episode": divergence.episode,
        "control_step": len(divergence.actions) - 1,
        "task": divergence.task.tolist(),
        "state_before": {name: values.tolist() for name, values in again.state.items()},
        "action": divergence.actions[-1].tolist(),
        "start": divergence.start.tolist(),
        "actions": divergence.actions.tolist(),
        "versions": dict(versions(experiment.physics)),
        "config": to_yaml(experiment),
    }


def read_dump(path: Path) -> Dump:
    """Read a dump.

    Raises:
        InputError: if it cannot be read or is none.
    """
    try:
        if not path.is_file():
            raise InputError(f"cannot read {path}: it is no plain file")
        if path.stat().st_size > LARGEST:
            raise InputError(f"{path} is too large for a dump: {path.stat().st_size} bytes")
        saved = json.loads(path.read_text(encoding="utf-8"))
        if saved["format"] != FORMAT:
            raise InputError(
                f"dump {path} has format {saved['format']}; this version of maml-rl reads format "
                f"{FORMAT}"
            )
        experiment = experiment_from(parse_yaml(saved["config"], str(path)), str(path))
        family = experiment.family
        divergence = Divergence(
            task_index=int(saved["task_index"]),
            task_seed=int(saved["task_seed"]),
            episode=int(saved["episode"]),
            task=numbers(saved["task"], len(family.task_columns)),
            start=numbers(saved["start"]),
            actions=numbers(saved["actions"], len(family.action_columns), rows=True),
        )
        expected = family.draw_start(np.random.Generator(np.random.Philox(0))).shape
        if divergence.start.shape != expected:
            raise ValueError(f"start has shape {divergence.start.shape}, expected {expected}")
        state = {str(name): numbers(v) for name, v in saved["state_before"].items()}
        made_with = {str(name): str(v) for name, v in saved["versions"].items()}
        return Dump(experiment, int(saved["iteration"]), divergence, state, made_with)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except InputError:
        raise
    except UNREADABLE as error:
        what = " ".join(str(error).split())
        raise InputError(f"{path} is not a dump of maml-rl: {what}") from error


def numbers(saved: object, width: int | None = None, *, rows: bool = False) -> Floats:
    """Return a list of numbers, or of rows, as an array; null, which JSON has for it, is NaN.

    Raises:
        ValueError: if it is none, or not `width` wide.
    """
    values = np.array(saved, np.float64)
    if values.ndim != 1 + rows or (width is not None and values.shape[-1] != width):
        raise ValueError(f"an array of shape {values.shape} is not what is expected here")
    return values
