"""What must fit in memory, told before it is taken or when it is not there."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from envs.family import TaskFamily
from maml_rl.config import Experiment, observation_size
from maml_rl.errors import InputError, RunStopped
from maml_rl.sampler import at_once

T = TypeVar("T")


def physical_memory() -> int:
    """Return the bytes of memory that this machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def parameter_count(experiment: Experiment[TaskFamily]) -> int:
    """Return the numbers that the experiment's own network and action noise have."""
    A = len(experiment.family.action_columns)
    widths = (observation_size(experiment), *experiment.policy.layers, A)
    return sum((i + 1) * o for i, o in itertools.pairwise(widths)) + A


def check_policy_memory(experiment: Experiment[TaskFamily]) -> None:
    """Raise InputError where the policy alone is larger than the machine's memory."""
    taken, available = 4 * parameter_count(experiment), physical_memory()
    if taken > available:
        raise InputError(
            f"a policy of {parameter_count(experiment)} parameters takes {taken / 1e9:,.1f} GB of "
            f"memory, and this machine has {available / 1e9:,.1f} GB: lower policy.layers"
        )


def check_memory(experiment: Experiment[TaskFamily], *sections: str) -> None:
    """Raise InputError where more must be in memory at once than the machine has.

    Counts only arrays that are made in any case: the episodes that an update or a test keeps, to
    their full horizon, the adapted parameters of every task, and what the family says of its
    worlds. So what is refused cannot fit; what is not refused may still not fit.

    Args:
        experiment: with every setting in its own range.
        sections: "sampling" for an update, "evaluation" for a test.

    Raises:
        InputError: with what to lower, and what it takes, GB.
    """
    family, sampling, test = experiment.family, experiment.sampling, experiment.evaluation
    inner, available = experiment.adaptation.inner_steps, physical_memory()
    parameters = parameter_count(experiment)
    # Observation, action, measures, reward and log-probability of a step.
    columns = (family.action_columns, family.measure_columns)
    numbers = observation_size(experiment) + sum(map(len, columns)) + 2
    # On a GPU, one batch at a time is here, and the parameters are there.
    on_cpu = experiment.device == "cpu"
    sizes = {
        "sampling": (sampling.tasks, sampling.episodes, inner),
        "evaluation": (test.tasks, test.episodes, min(1, test.steps)),
    }
    for section in sections:
        tasks, episodes, updates = sizes[section]
        batches, adapted = (updates + 1, tasks * updates + 1) if on_cpu else (1, 1)
        together = at_once(sampling.tasks_at_once, tasks, episodes)
        parts = (
            (
                4 * numbers * tasks * episodes * family.episode_steps * batches,
                f"{tasks} tasks x {episodes} episodes x {family.episode_steps} steps",
                f"{section}.tasks, {section}.episodes or family.horizon",
            ),
            (
                4 * parameters * adapted,
                f"policies of {parameters} parameters for {tasks} tasks",
                f"policy.layers or {section}.tasks",
            ),
            (
                (experiment.physics == "cpu") * family.world_bytes * together * episodes,
                f"simulations of {together} tasks x {episodes} episodes",
                f"sampling.tasks_at_once, {section}.tasks or {section}.episodes",
            ),
        )
        total = sum(part[0] for part in parts)
        if total > available:
            _, what, lower = max(parts)
            raise InputError(
                f"{section}: {what} take at least {total / 1e9:,.1f} GB of memory at once, and "
                f"this machine has {available / 1e9:,.1f} GB: lower {lower}"
            )


NO_MEMORY = re.compile(
    r"can't allocate memory|out of memory|Failed to allocate \d+ bytes|STATUS_ALLOC_FAILED"
)
"""What torch, CUDA, mujoco_warp and cuBLAS say in errors of a general kind."""


def is_out_of_memory(error: Exception) -> bool:
    """Whether an exception says that memory did not suffice, on the CPU or a GPU."""
    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or NO_MEMORY.search(str(error)) is not None


def repeated_where_memory_fails(attempt: Callable[[], T], take_less: Callable[[], None]) -> T:
    """Return what an attempt gives; while memory does not suffice, take less and try again."""
    while True:
        try:
            return attempt()
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        # Outside of the except block, where the failed attempt's arrays are free.
        take_less()


@contextmanager
def memory_to(what: str, lower: str) -> Iterator[None]:
    """Say what to lower where memory does not suffice for something.

    Raises:
        RunStopped: in place of that error.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise RunStopped(f"the memory does not suffice to {what}: lower {lower}", 3) from error


@contextmanager
def memory_to_sample(experiment: Experiment[TaskFamily], section: str) -> Iterator[None]:
    """Say what to lower where memory does not suffice for the worlds and their episodes.

    Args:
        experiment: all settings.
        section: "sampling" or "evaluation", whose tasks and episodes these are.

    Raises:
        RunStopped: in place of that error.
    """
    settings = getattr(experiment, section)
    together = at_once(experiment.sampling.tasks_at_once, settings.tasks, settings.episodes)
    with memory_to(
        f"sample {settings.tasks} tasks x {settings.episodes} episodes x "
        f"{experiment.family.horizon} steps",
        f"sampling.tasks_at_once (now {together}), {section}.episodes, family.horizon or "
        f"{section}.tasks",
    ):
        yield
